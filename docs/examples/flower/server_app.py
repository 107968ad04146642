"""The server."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from task import make_task

from sparsebilevel.federated.flower import DWNPStrategy, PackedGrid
from sparsebilevel.training.checkpoint import load_checkpoint, save_checkpoint

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config, grid = context.run_config, PackedGrid(grid)
    task = make_task(config)
    strategy = DWNPStrategy(
        task.model,
        task.points,
        task.input_shape,
        task.budgets,
        task.settings,
        task.hypernetwork,
        timeout=float(config["timeout"]),
        evaluate_every=int(config["evaluate-every"]),
    )
    federation = strategy.connect(grid)
    folder = Path(str(config["output-dir"])) if config["output-dir"] else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pth").exists():
            federation.load_state_dict(load_checkpoint(folder / "checkpoint.pth"))

    def save(server_round: int, arrays: ArrayRecord) -> None:
        if folder is not None:
            save_checkpoint(folder / "checkpoint.pth", federation.state_dict())

    strategy.start(grid, evaluate_fn=save)
    figures = strategy.rows[-1] if strategy.rows else federation.evaluate()  # none if the checkpoint was the end
    result = figures | {"bytes": grid.bytes, "failures": federation.failures}
    if task.settings.personal:
        result["devices"] = strategy.export()
    print(json.dumps(result))
    if folder is not None:
        (folder / "result.json").write_text(json.dumps(result))
