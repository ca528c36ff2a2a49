"""What the peers' words are natively; read by `compat`."""

from __future__ import annotations

# Class names, both sides without `Modifier`.
CLASSES = {
    "GMPruning": "MagnitudePruning",
    "GlobalMagnitudePruning": "MagnitudePruning",
    "WandaPruning": "Wanda",
    "LegacyQuantization": "Quantization",
}

FIELDS = {
    "params": "targets",
    "start_epoch": "start",
    "end_epoch": "end",
    "inter_func": "update_scheduler",
    "mask_type": "mask_structure",
    "disable_quantization_observer_epoch": "freeze_observer",
}

TARGETS = {
    "__ALL__": "Linear",
    "__ALL_PRUNABLE__": "Linear",
    "__ALL_QUANTIZABLE__": "Linear",
}

# Fields that say nothing to Paring, and why where that is not plain.
DROPPED = {
    "mappings": "the pairs are found from the model",
    "sequential_update": "blocks always go one after the other",
    "sequential_targets": "blocks are found from the model",
    "num_calibration_steps": "the stage's data says how much",
    "num_calibration_samples": "the stage's data says how much",
    "calibration_function": "",
    "distill_output_keys": "it is the logits",
    "num_grads": "decay says how long a gradient counts",
    "damp": "dampening_frac is a fraction of the Fisher's mean",
    "log_types": "",
    "constant_logging": "",
    "offload_hessians": "",
}
# Of one modifier only.
DROPPED_OF = {
    ("ConstantPruning", "update_frequency"): "a constant mask has no updates",
    ("Distillation", "update_frequency"): "it acts at every step",
}

# What of quantization during training is kept whatever else its settings say.
QUANTIZATION_TIMES = (
    *("start_epoch", "end_epoch", "start", "end"),
    "disable_quantization_observer_epoch",
)

# Keys of quantization by SparseML's first engine, which worked on another vocabulary.
LEGACY_QUANTIZATION = {
    "submodules",
    "scheme_overrides",
    "post_oneshot_calibration",
    "freeze_bn_stats_epoch",
}

# Modifiers that are settings of the training loop here: their fields and ours.
TRAINING = {
    "EpochRange": {"end_epoch": "epochs"},
    "LearningRateFunction": {"init_lr": "learning_rate", "lr_func": "lr_scheduler"},
    "SetLearningRate": {"learning_rate": "learning_rate"},
    "SetWeightDecay": {"weight_decay": "weight_decay"},
}

SCHEDULERS = {"cyclic_linear": "linear"}
