"""The settings of `conf/train.yaml`, for tests that change a few of them."""

from __future__ import annotations

from sslcli.config.settings import TrainSettings

TRAIN = TrainSettings(
    epochs=20,
    max_steps=None,
    max_time=None,
    batch_size=256,
    accumulate=1,
    cached_gradients=False,
    precision="auto",
    compile="auto",
    sharding="none",
    activation_checkpointing=False,
    deterministic="auto",
    clip_grad=None,
    log_every_steps=10,
    save_every_epochs=1,
    save_every_steps=None,
    keep=3,
    lr_scaling="linear",
    schedule="cosine",
    warmup_epochs=1.0,
    final_lr=0.0,
    milestones=[0.6, 0.8],
    decay_norm_and_bias=False,
)
