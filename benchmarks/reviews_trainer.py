"""Reviews: raytx beside Hugging Face's Trainer: the same model, data, tokenizer, batch size and steps, several seeds.

    python benchmarks/reviews_trainer.py reviews.csv --seeds 0 1 2 --steps 400

Prints accuracy and F1 on the same held-out tenth for each seed, their means and spreads, and the ratio of samples per
second, measured in the same run. Trainer needs `pip install accelerate`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from raytx import cluster
from raytx.journal import rows
from raytx.plan import Plan, resolve
from raytx.prepare import Prepared, prepare
from raytx.recipe import load
from raytx.train import fit

RECIPE = Path(__file__).parents[1] / "examples" / "reviews.yaml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    storage = tempfile.mkdtemp(prefix="raytx-reviews-")
    table = []
    try:
        for seed in options.seeds:
            plan, prepared = planned(options.csv, storage, seed, options.steps)
            table.append({"seed": seed, "raytx": with_raytx(plan), "trainer": with_trainer(plan, prepared, storage)})
            print(json.dumps(table[-1]), flush=True)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    for metric in ("accuracy", "f1", "loss"):
        print(metric, {who: spread([row[who][metric] for row in table]) for who in ("raytx", "trainer")})
    ratios = [row["raytx"]["samples_per_s"] / row["trainer"]["samples_per_s"] for row in table]
    print("samples per second, raytx / Trainer", spread(ratios))


def planned(csv: str, storage: str, seed: int, steps: int) -> tuple[Plan, Prepared]:
    """One process on both sides, so that the two do the same work on the same cores."""
    overrides = [
        f"data.path={Path(csv).absolute()}",
        f"name=seed{seed}",
        f"storage_path={storage}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        "train.epochs=null",
        "train.micro_batch_size=32",
        "evaluate.every=null",
        "save={}",
        "export=[]",
        "strategy.type=single",
        "scaling.num_workers=1",
        "scaling.threads_per_worker=2",
    ]
    return prepare(resolve(load(RECIPE, overrides)), Console(quiet=True))


def with_raytx(plan: Plan) -> dict[str, float]:
    cluster.connect()
    metrics = fit(plan).metrics
    steps = [row for row in rows(plan.run_dir / "metrics.jsonl") if row["kind"] == "step"]
    return {**metrics, "samples_per_s": statistics.median(row["samples_per_s"] for row in steps)}


def with_trainer(plan: Plan, prepared: Prepared, storage: str) -> dict[str, float]:
    """The same weights at the start, optimizer, schedule and features; Trainer shuffles and batches by itself."""
    import torch
    from transformers import Trainer, TrainingArguments

    torch.set_num_threads(2)
    model = plan.recipe.model.build()
    task = model.task(prepared.processor)
    module = model.module(prepared.processor, seed=plan.recipe.train.seed)
    optim, train = plan.recipe.optim, plan.recipe.train
    arguments = TrainingArguments(
        output_dir=f"{storage}/trainer",
        max_steps=plan.steps,
        per_device_train_batch_size=train.global_batch_size,
        per_device_eval_batch_size=train.global_batch_size,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm or 0.0,
        warmup_steps=plan.warmup_steps,
        lr_scheduler_type=optim.schedule,
        seed=train.seed,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.from_numpy(value) for key, value in task.collate(samples).items()}

    def metrics(prediction: Any) -> dict[str, float]:
        features = {"labels": prediction.label_ids}
        loss = task.loss(features, prediction.predictions)
        return task.metrics([task.evaluation(features, loss, prediction.predictions, len(prediction.label_ids))])

    held_out = list(_every(prepared.samples("test")))
    trainer = Trainer(
        model=module,
        args=arguments,
        train_dataset=list(_every(prepared.samples("train"))),
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=metrics,
    )
    speed = trainer.train().metrics["train_samples_per_second"]
    measured = trainer.evaluate()
    return {name: measured[f"eval_{name}"] for name in ("loss", "accuracy", "f1")} | {"samples_per_s": speed}


def _every(samples: Any) -> Any:
    return (sample for start in range(len(samples)) for sample in samples[[start]])


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
