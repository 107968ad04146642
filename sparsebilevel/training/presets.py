"""Recipes of the papers, as values of `Config` by name. Explicit settings win over a preset.

Where a paper is silent or contradicts itself, the comment says what was chosen. Batch sizes are of one process:
ImageNet recipes assume eight (``torchrun --nproc-per-node 8 --no-python sparsebilevel train --preset ...``).

The search space of BiDST follows the sparsity (`config.default_search_space`): one preset serves 90, 95 and 98 %.
"""

from __future__ import annotations

from typing import Any

# BiDST (Ji et al. 2024), table A.1, but the library's form and scale of the implicit term; as published it is
# --lower-gradient batch --implicit-on all --implicit-scale 1e4 (lambda 1e-4; 2e4 on ImageNet). Left dense
# are the layers of MEST, whose uniform setting the paper inherits: stem, 1x1 shortcuts, classifier.
_BIDST: dict[str, Any] = {"method": "bidst", "lr": 0.1, "lr_min": 4e-8, "update_freq": "8ep", "update_end": "1.0"}
_BIDST_CIFAR = _BIDST | {"batch_size": 64, "epochs": 158}
_RESNET_CIFAR = {"exclude": ("conv1", "*shortcut*", "fc")}

# Of every ImageNet ResNet-50 recipe here: uniform sparsity with a dense first layer.
_IMAGENET: dict[str, Any] = {
    **{"arch": "resnet50", "data": "imagefolder", "distribution": "uniform", "dense_first": True},
    **{"channels_last": True, "amp": "bf16", "eval_batch_size": 128},
}

# RigL's CIFAR figures are for WRN-22-2; the update schedule is carried over to the networks here.
_RIGL_CIFAR: dict[str, Any] = {
    **{"method": "rigl", "distribution": "erk", "update_freq": "100", "update_end": "0.75", "drop_fraction": 0.3},
    **{"batch_size": 128, "epochs": 250, "lr": 0.1, "nesterov": True, "weight_decay": 5e-4},
    **{"lr_scheduler": "step", "lr_milestones": "0.3,0.6,0.9", "lr_gamma": 0.2},
}

# BiP (Zhang et al. 2022), values of its released configurations; the scores by this library's rule, which follows the
# learning rate. As published: --initial-scores magnitude --lower-gradient batch --score-lr 0.1 --score-momentum 0.9;
# but for a weight decay of the scores, which its code has and this library has not.
_BIP: dict[str, Any] = {
    **{"method": "bip", "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "epochs": 100},
    **{"pretrain_epochs": 200, "pretrain_weight_decay": 5e-4, "finetune_epochs": 100, "finetune_weight_decay": 5e-4},
    **{"upper_split": "same"},
}

# Lottery tickets (Frankle & Carbin 2019; open_lth): 20 % of the remaining weights a level, 10 levels to 10.7 %.
_IMP: dict[str, Any] = {
    **{"method": "imp", "levels": 10, "rate": 0.2, "rewind_step": "1000", "epochs": 160, "batch_size": 128},
    **{"lr": 0.1, "lr_scheduler": "step", "lr_milestones": "80ep,120ep", "weight_decay": 1e-4},
}

PRESETS: dict[str, dict[str, Any]] = {
    "bidst-resnet32x2-cifar10": _BIDST_CIFAR
    | _RESNET_CIFAR
    | {"arch": "resnet32x2", "data": "cifar10", "weight_decay": 1e-4},
    "bidst-resnet32x2-cifar100": _BIDST_CIFAR
    | _RESNET_CIFAR
    | {"arch": "resnet32x2", "data": "cifar100", "weight_decay": 1e-4},
    "bidst-vgg19-cifar10": _BIDST_CIFAR
    | {"arch": "vgg19_bn_cifar", "data": "cifar10", "weight_decay": 5e-4, "lr_warmup_epochs": 5}
    | {"exclude": ("features.0", "fc")},
    "bidst-vgg19-cifar100": _BIDST_CIFAR
    | {"arch": "vgg19_bn_cifar", "data": "cifar100", "weight_decay": 5e-4, "lr_warmup_epochs": 5}
    | {"exclude": ("features.0", "fc")},
    "bidst-mobilenetv2-cifar10": _BIDST_CIFAR
    | {"arch": "mobilenet_v2_cifar", "data": "cifar10", "weight_decay": 5e-5, "epochs": 347, "lr_warmup_epochs": 5}
    | {"exclude": ("conv1", "*shortcut*", "fc")},
    # 1024 samples a step; warm-up 8 epochs as in the table (the text says 5); topology changes every 8 epochs, which is
    # what the paper's counts of updates amount to (its table says 5).
    "bidst-resnet50-imagenet": _BIDST
    | _IMAGENET
    | {"batch_size": 128, "epochs": 148, "lr": 1.024, "lr_min": 0.0, "momentum": 0.875}
    | {"weight_decay": 3.05e-5, "lr_warmup_epochs": 8},
    "rigl-resnet20-cifar10": _RIGL_CIFAR | {"arch": "resnet20", "data": "cifar10"},
    "rigl-resnet32x2-cifar10": _RIGL_CIFAR | {"arch": "resnet32x2", "data": "cifar10"},
    # 32 000 steps of 4096 samples (8 x 512), changes until step 25 000; lr 1.6, falling at 30, 70, 90 epochs.
    "rigl-resnet50-imagenet": _IMAGENET
    | {"method": "rigl", "update_freq": "100", "update_end": "25000", "drop_fraction": 0.3, "batch_size": 512}
    | {"epochs": 102, "lr": 1.6, "lr_warmup_epochs": 5, "lr_scheduler": "step", "lr_milestones": "30ep,70ep,90ep"}
    | {"weight_decay": 1e-4, "label_smoothing": 0.1},
    "bip-resnet20-cifar10": _BIP | {"arch": "resnet20", "data": "cifar10"},
    "bip-resnet18-cifar10": _BIP | {"arch": "resnet18_cifar", "data": "cifar10"},
    "bip-resnet18-cifar100": _BIP | {"arch": "resnet18_cifar", "data": "cifar100"},
    "imp-resnet20-cifar10": _IMP | {"arch": "resnet20", "data": "cifar10"},
    # The network of `sparsebilevel demo`: minutes on two CPU cores, nothing to download.
    "bidst-digits": {
        **{"method": "bidst", "arch": "digits_cnn", "data": "digits", "sparsity": 0.9, "distribution": "erk"},
        **{"epochs": 20, "batch_size": 32, "lr": 0.1, "update_freq": "0.05", "validation": 0.1},
        "threads": 1,  # two threads gain nothing on so small a network, and on a busy machine wait for each other
    },
}
