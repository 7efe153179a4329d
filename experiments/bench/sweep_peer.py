"""The peer's side of sweep.py: Ray Tune, one process per trial, TRL's SFTTrainer, PEFT, LoRA+."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def trial(given: dict[str, Any], setting: dict[str, Any]) -> None:
    """One trial, as Tune's and TRL's documentation have it."""
    import datasets
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from ray import tune
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
        get_cosine_schedule_with_warmup,
    )
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    params, steps = given.get("trial", given), setting["steps"]

    class Report(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
            loss = metrics["eval_loss"]
            tune.report({"eval_loss": loss, "step": state.global_step, "at": time.time()})

    base = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            r=params["methods.0.rank"],
            lora_alpha=params["methods.0.alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    optimizer = create_loraplus_optimizer(
        model=model,
        optimizer_cls=torch.optim.AdamW,
        lr=params["optim.lr"],
        loraplus_lr_ratio=params["methods.0.lr_ratio"],
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            eval_strategy="steps",
            eval_steps=10,
            max_length=128,
            completion_only_loss=True,
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=False,  # TRL would choose it by default: on a CPU three times slower
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.load_from_disk(setting["train"]),
        eval_dataset=datasets.load_from_disk(setting["eval"]),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]),
        optimizers=(optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)),
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def rows(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """The rows that rayft tokenises, as datasets on disk."""
    import datasets

    import rayft
    from rayft.compose.data import open_corpus, prepare_data
    from rayft.config.load import load
    from rayft.models.tokenizer import BUILTIN

    run = load({key: value for key, value in config.items() if key not in ("trials", "sweep")})
    prepared = prepare_data(run, lambda function, items: [function(item) for item in items])
    corpus = open_corpus(run, prepared.uri, prepared.hash)
    setting = {
        "steps": run.train.steps,
        "model": str(BUILTIN["tiny"]),
        "version": rayft.__version__,
    }
    for name, table in (("train", corpus.train), ("eval", corpus.eval)):
        parts = [table.document(index) for index in range(table.documents)]
        setting[name] = f"{folder}/{name}"
        datasets.Dataset.from_dict(
            {
                "input_ids": [ids.tolist() for ids, _ in parts],
                "completion_mask": [mask.astype(int).tolist() for _, mask in parts],
            }
        ).save_to_disk(setting[name])
    return setting


def search(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune's space and what else its TuneConfig gets: the fixed list, or, for sweep.py --quality,
    Optuna over rayft's space."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    how = config["trials"]
    if isinstance(how, list):
        return {"trial": tune.grid_search(how)}, {}
    space = {
        path: tune.choice(domain["choice"])
        if "choice" in domain
        else tune.loguniform(*domain["loguniform"])
        for path, domain in config["sweep"]["space"].items()
    }
    facts = {"num_samples": how["trials"], "time_budget_s": how["limit"]}
    return space, facts | {"search_alg": OptunaSearch(seed=config["seed"])}


def main() -> None:
    """The sweep; the last line is JSON."""
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler

    config = json.loads(Path(sys.argv[1]).read_text())
    folder = tempfile.mkdtemp()
    setting = rows(config, folder)
    ray.init(log_to_driver=False, logging_level="ERROR")
    steps = setting["steps"]
    scheduler = AsyncHyperBandScheduler(
        time_attr="step", max_t=steps, grace_period=10, reduction_factor=3
    )
    space, searched = search(config)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, setting=setting), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="eval_loss", mode="min", scheduler=scheduler, **searched
        ),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    )
    results = tuner.fit()
    best = results.get_best_result(scope="all")
    frames = [result.metrics_dataframe for result in results]
    history = [
        pair
        for frame in frames
        if frame is not None and "eval_loss" in frame
        for pair in zip(frame["at"].tolist(), frame["eval_loss"].tolist(), strict=True)
    ]
    found = {
        "history": [(at, loss) for at, loss in history if math.isfinite(loss)],
        "best": float(best.metrics_dataframe["eval_loss"].min()),
        "winner": best.config.get("trial", best.config),
        "steps": sum(int((result.metrics or {}).get("step", 0)) for result in results),
        "failed": results.num_errors,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
