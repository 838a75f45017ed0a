"""What a user of accelerate starts on two processes: Trainer on prepared arrays. first_step.py measures it.

accelerate launch --multi_gpu --num_processes 2 trainer_script.py DIRECTORY MICRO_BATCH_SIZE
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from by_hand import Work, training_arguments
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, set_seed


class Times(TrainerCallback):
    """Notes when each update was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **rest: Any) -> None:
        self.times.append(time.time())


def main(directory: Path, micro: int) -> None:
    set_seed(0)
    arrays = dict(np.load(directory / "samples.npz"))
    targets, order = arrays.pop("num_targets"), arrays.pop("order")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work = Work(lambda: model(directory), arrays, targets, order, micro, rank, ranks)
    noted = Times()
    trainer = Trainer(
        model=work.module(),
        args=training_arguments(work),
        train_dataset=[int(sample) for sample in order.flat],
        data_collator=lambda samples: work.batch(np.asarray(samples)),
        callbacks=[noted],
    )
    trainer.train()
    if rank == 0:
        (directory / "times.json").write_text(json.dumps(noted.times))


def model(directory: Path) -> nn.Module:
    """Return the same model as raytx's, from random weights."""
    config = json.loads((directory / "config.json").read_text())
    settled = AutoConfig.for_model(**config)
    settled.use_cache = False
    return AutoModelForCausalLM.from_config(settled)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
