"""The devices."""

from flwr.app import Context
from task import make_clients

from sparsebilevel.federated import Clients
from sparsebilevel.federated.flower import make_client_app, pack_mod


def clients(context: Context) -> Clients:
    """The run's, with data from the node's own folder."""
    return make_clients(context.run_config, str(context.node_config.get("data-path", ".data")))


app = make_client_app(clients, mods=[pack_mod])
