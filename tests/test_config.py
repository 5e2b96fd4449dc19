from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
from composer import Trainer

from alignclip.config.plugged import TASKS
from alignclip.config.reading import REFUSED, evaluators_of, load, load_evaluation, to_yaml
from alignclip.config.schema import RunConfig, TrainerConfig
from alignclip.errors import UserError
from alignclip.training import plugins

EVALUATE = Path(__file__).parent.parent / "yamls" / "evaluate.yaml"
YAMLS = sorted(path for path in EVALUATE.parent.glob("*.yaml") if path != EVALUATE)

# Arguments of the Trainer that this project makes itself, or that would change the objective, or
# evaluation's.
OURS = {
    "self", "model", "train_dataloader", "optimizers", "schedulers", "step_schedulers_every_batch",
    "algorithms", "callbacks", "loggers", "device_train_microbatch_size",
    "accumulate_train_batch_on_tokens", "scale_schedule_ratio",
}  # fmt: skip
NOT_IN_A_YAML = {
    "algorithm_passes",
    "console_stream",
    "load_object_store",
    "train_dataloader_label",
}
EVALUATION = {"eval_dataloader", "eval_interval", "eval_subset_num_batches"}


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_shipped_yamls_are_valid(path: Path) -> None:
    plugins.check(load(path))


def test_the_shipped_evaluation_is_valid() -> None:
    config = load_evaluation(EVALUATE, ["checkpoint=runs/first", "evaluators.cars=null"])
    # a set that not everybody has made is no part of what is evaluated
    assert not [name for name, one in config.evaluators.items() if "pets" in (one.local or name)]
    assert config.evaluators["cifar10-clusters"].task == "clustering"
    shown = {evaluator.task for evaluator in config.evaluators.values()}
    assert shown == set(TASKS), "yamls/evaluate.yaml has an evaluator of every task"
    assert "cars" not in config.evaluators


def test_every_trainer_argument_is_a_key_or_left_out_on_purpose() -> None:
    keys = {f.name for f in fields(TrainerConfig)}
    assert (
        set(inspect.signature(Trainer.__init__).parameters)
        == keys | OURS | NOT_IN_A_YAML | EVALUATION
    )


def test_published_recipe() -> None:
    alignclip = load(next(p for p in YAMLS if p.stem == "alignclip"))
    optimizer, scheduler, loss, model = (
        alignclip.optimizer,
        alignclip.scheduler,
        alignclip.loss,
        alignclip.model,
    )
    assert (alignclip.max_duration, alignclip.global_train_batch_size) == ("30ep", 512)
    assert (optimizer.opt, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        "adamw",
        1e-3,
        [0.9, 0.98],
        0.1,
    )
    # the published loop back-propagates four times this loss, with eps 1e-6
    assert optimizer.eps == 1e-6 / 4
    assert (scheduler.t_warmup, scheduler.alpha_f) == ("10000ba", 0.0)
    assert (loss.alpha, loss.beta, loss.separate_image, loss.separate_text, loss.rescale) == (
        1,
        0.5,
        True,
        True,
        True,
    )
    assert (
        model.embed_dim,
        model.vision_cfg.width,
        model.vision_cfg.layers,
        model.vision_cfg.patch_size,
    ) == (
        768,
        768,
        12,
        16,
    )
    assert (model.text_cfg.width, model.text_cfg.heads, model.text_cfg.layers) == (768, 12, 12)
    assert alignclip.data.scale == [0.9, 1.0]
    for name in ("clip", "sharedclip"):
        other = load(next(p for p in YAMLS if p.stem == name))
        assert other.optimizer.eps == 1e-6
        assert other.loss.beta == 0
        assert other.data == alignclip.data


def test_overrides_win_and_the_resolved_file_reads_back(yaml: Path, tmp_path: Path) -> None:
    config = load(
        yaml,
        [
            "optimizer.lr=3e-4",
            "data.streams.other.remote=s3://b/x",
            "algorithms.EMA.half_life=100ba",
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert config.data.streams.keys() == {"e", "other"}
    assert config.algorithms == {"EMA": {"half_life": "100ba"}}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml") == config


GAP = "evaluators.a={task: gap, local: x}"
RESUMED = "autoresume=true; run_name=a; save_folder=b"
# overrides, and what is said of them
BAD = {
    "optimiser.lr=1": "unknown key 'optimiser'; did you mean 'optimizer'?",
    "model.vision_cfg.patchsize=8": (
        "unknown key 'model.vision_cfg.patchsize'; did you mean 'patch_size'?"
    ),
    "data.streams.e.remot=s3://x": "unknown key 'data.streams.e.remot'; did you mean 'remote'?",
    "max_durations=1ep": "did you mean 'max_duration'?",
    "model.embed_dim=wide": "model.embed_dim: Value 'wide'",
    "global_train_batch_size=16.5": "global_train_batch_size",
    "data.shuffle=perhaps": "data.shuffle",
    "model=3": "'model' is a section",
    "data=null": "data: ",
    "nonsense": "not of the form key.sub=value",
    "device_train_microbatch_size=4": "model.encode_chunk_size",
    "parallelism_config.fsdp.verbose=true": "parallelism_config.fsdp2",
    "global_train_batch_size=0": "must be positive",
    "loss.beta=-1": "must not be negative",
    "model.encode_chunk_size=-4": "must not be negative",
    "data.scale=[1.0]": "data.scale must be two numbers",
    "data.streams.other.split=train": "data.streams.other has neither remote nor local",
    "autoresume=true": "autoresume=true needs run_name",
    "data.streams=[a]": "'data.streams' holds names",
    "loss.beta=nan": "loss.beta must be a finite number",
    "model.text_cfg.heads=0": "must be positive",
    "model.text_cfg.vocab_size=100": "CLIP's tokenizer has 49408 tokens",
    "save_num_checkpoints_to_keep=0": "must be -1 (all) or at least 1",
    "scale_schedule_ratio=0.5": "is refused",
    "lr=1e-4": "the command line: unknown key 'lr'; did you mean 'optimizer.lr'?",
    "--optimizer.lr=1e-4": "write 'optimizer.lr=1e-4', without dashes",
    "optimizer.lr=fast": "the command line: optimizer.lr: Value 'fast'",
    "data.streams.e=null": "data.streams is empty",
    "save_interval=2": "save_interval=2 has no unit: 2ep (epochs) or 2ba (batches)?",
    "save_interval=0ba": "save_interval=0ba must be positive",
    "save_interval=10m": "save_interval=10m is no time",
    "max_duration=6": "max_duration=6 has no unit",
    "max_duration=1000sp": "write a number and a unit, ep (epochs), ba (batches)",
    "max_duration=3parsecs": "max_duration=3parsecs is no time",
    "max_duration=1e400ba": "max_duration=1e400ba is no time",
    "max_duration=1e19ep": "max_duration=1e19ep is no time",
    "max_duration=1.5ep": "the number before ep must be whole",
    "scheduler.t_warmup=-5ba": "scheduler.t_warmup=-5ba is no time",
    "console_log_interval=1.2.3ba": "is no time",
    "save_folder=s3:/bucket/x": (
        "save_folder=s3:/bucket/x has one slash; did you mean 's3://bucket/x'?"
    ),
    "data.streams.e.remote=gs:/b": "did you mean 'gs://b'?",
    "parallelism_config.fsdp2.state_dict_type=sharded": "is refused: checkpoints are full ones",
    "run_name=a/b": "must not hold a '/'",
    "run_name={rank}": "must not hold braces",
    f"run_name={'ü' * 128}": "is too long for the name of a folder",
    "run_name=\udcff": "run_name='\\udcff' is no UTF-8",
    "data.streams.e.local=/a/\udcff": "data.streams.e.local='/a/\\udcff' is no UTF-8",
    "data.cache_limit=infgb": "data.cache_limit=infgb is no size: write e.g. 500gb",
    "data.cache_limit=much": "data.cache_limit=much is no size",
    "compile_config.mod=max-autotune": "did you mean 'mode'?",
    "compile_config.mode=max-autotun": "did you mean 'max-autotune'?",
    "ddp_sync_strategy=multi_auto": "did you mean 'multi_auto_sync'?",
    "python_log_level=warn": "did you mean 'warning'?",
    "parallelism_config.fsdp2.mixed_precision=half": (
        "mixed_precision=half: valid: DEFAULT, FULL, PURE"
    ),
    "train_subset_num_batches=0": "must be -1 (all) or at least 1",
    "seed=-1": "seed must not be negative",
    "dist_timeout=-1": "dist_timeout must be positive",
    "data.prefetch_factor=0": "data.prefetch_factor=0 must be at least 1",
    "model.init_logit_scale=1000": "must lie in [-20, 20]",
    "save_filename=ep{epoch}-{btch}.pt": "{btch} is unknown; did you mean 'batch'?",
    "save_latest_filename=latest-{epoch}.pt": "may hold {run_name} and {rank} only",
    "save_folder=runs/{run_name}": "save_folder needs a run_name",
    "profiler.activ=3": "did you mean 'active'?",
    "scheduler.t_warmup=40ba": "scheduler.t_warmup=40ba must be shorter than max_duration=40ba",
    "scheduler.t_warmup=40ep": "scheduler.t_warmup=40ep must be shorter than max_duration=40ba",
    "model.vision_cfg.image_size=33": (
        "image_size=33 is no multiple of model.vision_cfg.patch_size=8"
    ),
    "model.text_cfg.heads=3": "model.text_cfg.width=32 is no multiple of model.text_cfg.heads=3",
    "model.vision_cfg.layers=3": "model.shared.blocks=-1 needs equal towers, but",
    "python_log_level=inf": "python_log_level=inf: did you mean 'info'?",
    "data.streams=x": "'data.streams' holds names with settings below each, not 'x'",
    "evaluators=5": "'evaluators' holds names with settings below each, not '5'",
    "model.vision_cfg.timm_model_name=resnet18": "nothing can be shared with timm's tower",
    "precision=amp_fp16": "precision=amp_fp16 needs a GPU; with device=cpu",
    "precision=amp": "precision=amp: did you mean 'amp_fp16'?",
    "precision=bf16": "precision=bf16: did you mean 'amp_bf16'?",
    "device=cuda": "device=cuda: did you mean 'gpu'?",
    "optimizer.learning_rate=1e-3": "did you mean 'lr'?",
    "data.sampling_method=even": "data.sampling_method=even: valid: balanced, fixed",
    "data.batching_method=per_stram": "did you mean 'per_stream'?",
    "data.sampling_granularity=0": "data.sampling_granularity must be positive",
    "data.streams.e={repeat: 2, choose: 3}": (
        "data.streams.e: repeat and choose exclude one another"
    ),
    "data.streams.e.repeat=-1": "data.streams.e.repeat must not be negative",
    "data.streams.f={local: there, proportion: 0.5}": (
        "data.streams.e has no proportion, and data.streams.f has"
    ),
    "optimizer.betas=[0.9, 1.5]": "optimizer.betas must lie in [0, 1), not 1.5",
    "optimizer.eps=-1e-6": "optimizer.eps must not be negative",
    "save_folder=runs/{batch}": "save_folder=runs/{batch} may hold {run_name}, and no other braces",
    "save_folder=runs/{run_name": "may hold {run_name}, and no other braces",
    "keep_best.metric=a/acc1": "an evaluator and its metric: there are none",
    f"{GAP}; keep_best.metric=a": "must be an evaluator and its metric",
    f"{GAP}; keep_best.metric=a/rmg; keep_best.mode=low": "valid: max",
    f"{GAP}; keep_best.metric=a/rmg": "needs a save_folder",
    f"{GAP}; keep_best.metric=a/alignment_scor": (
        "a/alignment_scor is no metric of gap; did you mean 'a/alignment_score'?"
    ),
    f"{GAP}; keep_best.metric=a/recall@5": (
        "is no metric of gap; did you mean 'a/image_retrieval_recall@5'?"
    ),
    f"{GAP}; evaluators.a.interval=5": "has no unit",
    f"{RESUMED}; save_weights_only=true": ("leave out what a resumed run needs"),
    f"{RESUMED}; save_ignore_keys=[state/optimizers]": "leave out what a resumed run needs",
    f"{RESUMED}; save_filename=model.pt": ("save_filename=model.pt must hold {batch}"),
    "autoresume=true; run_name=a; save_folder=b; algorithms.SAM={}": "SAM does not resume",
    "save_num_checkpoints_to_keep=2; save_filename=ba{batch}.pt": "knows checkpoints by names",
    "algorithms.EMA.half_life=1ba; parallelism_config.fsdp2.verbose=false": "use one or the other",
    "loss.rescale=false; loss.separate_text=false": "separate_image",
    "max_duration=2ep; scheduler.t_warmup=2ep": (
        "t_warmup=2ep must be shorter than max_duration=2ep; 0ba is none"
    ),
    "max_duration=1ep; train_subset_num_batches=5": (
        "must be shorter than max_duration=1ep; 0ba is none"
    ),
    f"save_folder=x; {GAP}; keep_best.metric=a/alignment_std": (
        "a/alignment_std is better neither way; name keep_best.mode: max or min"
    ),
}

# which are known to Composer alone
BAD_CLASSES = {
    "algorithms.Ema.half_life=1ba": "no class 'Ema' in composer.algorithms; did you mean 'EMA'?",
    "algorithms.EMA.halflife=1ba": (
        "unknown key 'algorithms.EMA.halflife'; did you mean 'half_life'?"
    ),
    "algorithms.GradientClipping.clipping_type=norm": (
        "algorithms.GradientClipping needs clipping_threshold"
    ),
    "algorithms.MixUp.alpha=0.2": "algorithms.MixUp is refused",
    "algorithms.NoOpModel={}": "algorithms.NoOpModel is refused",
    "algorithms.GradientClipping={clipping_type: nrm, clipping_threshold: 1.0}": (
        "clipping_type=nrm: did you mean 'norm'?"
    ),
    "callbacks.LrMonitor={}": "did you mean 'LRMonitor'?",
    "callbacks.CheckpointSaver={}": "no class 'CheckpointSaver'",
    "loggers.TensorBoardLogger={}": "did you mean 'TensorboardLogger'?",
    "callbacks.EMA.half_life=1ba": "callbacks: EMA is one of the algorithms: algorithms.EMA",
    "callbacks.SpeedMonitor.window_size=017": (
        "SpeedMonitor.window_size: Value '017' is no whole number: write it in decimal digits, "
        "without leading zeros, as in 17"
    ),
    "loggers.FileLogger.capture_stdout=perhaps": "Value 'perhaps' is neither true nor false",
    "loggers.FileLogger.filename=[a]": "loggers.FileLogger.filename: Value ['a'] is a list",
    "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 1e999}": (
        "must be a finite number"
    ),
}

# of evaluate.py
BAD_EVALUATIONS = {
    "checkpoint=a; checkpoints.b=c": "not both",
    "": "name what to evaluate",
    "checkpoint=a; evaluators.x.task=zeroshot": "did you mean 'zero_shot'?",
    "checkpoint=a; evaluators.x.task=gap": "evaluators.x has neither remote nor local",
    "checkpoint=a; evaluators.coco.train.local=b": "retrieval has no use for train",
    "checkpoint=a; evaluators.x.task=linear_probe; evaluators.x.local=b": (
        "linear_probe needs train"
    ),
    "checkpoint=a; evaluators.coco.remote=s3:/b/c": "did you mean 's3://b/c'?",
    "checkpoint=a; evaluators.coco.batch_size=0": (
        "evaluators.coco.batch_size must be at least 1, not 0"
    ),
    "checkpoint=a; evaluators.coco.intervall=1ep": "did you mean 'interval'?",
    "checkpoint=a; max_duration=1ep": "unknown key 'max_duration'",
    "checkpoint=a; device=cuda": "device=cuda: did you mean 'gpu'?",
}


@pytest.mark.parametrize(("overrides", "says"), [*BAD.items(), *BAD_CLASSES.items()])
def test_bad_values_are_one_line(yaml: Path, overrides: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        plugins.check(load(yaml, overrides.split("; ")))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [r'"\ud800"', "${oc.env:NOT_UTF_8}"])
def test_a_text_that_is_no_utf_8_is_found_where_it_comes_from_elsewhere(
    yaml: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOT_UTF_8", "\udcff")
    content = yaml.read_text("utf-8")
    yaml.write_text(f"save_folder: {text}\n{content}", "utf-8")
    with pytest.raises(UserError, match=r"^save_folder='\\ud.*' is no UTF-8$"):
        load(yaml)


@pytest.mark.parametrize(("overrides", "says"), BAD_EVALUATIONS.items())
def test_bad_evaluations_are_one_line(overrides: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        load_evaluation(EVALUATE, overrides.split("; ") if overrides else [])
    assert says in str(error.value)


def test_settings_without_an_effect_may_have_any_value(yaml: Path) -> None:
    assert load(yaml, ["python_log_level=Info"]).python_log_level == "Info"
    timm = ["shared={blocks: 0, ln_final: false, projection: false}", "vision_cfg.patch_size=0"]
    model = [f"model.{one}" for one in timm]
    with pytest.raises(UserError, match="patch_size must be positive"):
        load(yaml, model)
    load(yaml, [*model, "model.vision_cfg.timm_model_name=resnet50"])
    gap = {"task": "gap", "local": "x", "interval": 1000}
    load_evaluation(EVALUATE, ["checkpoint=a", "evaluators.coco.interval=1000"])
    assert evaluators_of({"gap": gap})["gap"].interval == "1000"


@pytest.mark.parametrize("time", ["1ep", "3e3ba", "500sp", "90sec", "0.1dur", "20BA"])
def test_composers_times_are_times(yaml: Path, time: str) -> None:
    assert load(yaml, [f"save_interval={time}", "scheduler.t_warmup=0ba"]).save_interval == time


def test_a_set_of_the_file_can_be_replaced_on_the_command_line(yaml: Path) -> None:
    config = load(yaml, ["data.streams.e=null", "data.streams.mine.local=/data/mine"])
    assert config.data.streams.keys() == {"mine"}


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "alignclip.yaml").write_text("max_duration: 1ep\n")
    with pytest.raises(
        UserError,
        match=r"no config file .*alignclp\.yaml'; did you mean '.*alignclip\.yaml'|did you mean",
    ):
        load(tmp_path / "alignclp.yaml")
    with pytest.raises(UserError, match="the first argument is the YAML file"):
        load("run_name=a")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "broken.yaml").write_text("model: {embed_dim: 3\n")
    with pytest.raises(UserError, match="is not a YAML file"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="does not hold keys and values"):
        load(tmp_path / "list.yaml")


def test_refused_keys_are_no_keys() -> None:
    top = {f.name for f in fields(RunConfig)}
    assert not [key for key in REFUSED if key in top]


def test_null_takes_a_whole_section_of_names_out() -> None:
    """What the line names besides stays, whatever the file calls by the same name."""
    gap = ["evaluators.gap.task=gap", "evaluators.gap.local=/data/mine"]
    config = load_evaluation(EVALUATE, ["checkpoint=runs/first", "evaluators=null", *gap])
    assert list(config.evaluators) == ["gap"]
    with pytest.raises(UserError, match="evaluators is empty"):
        load_evaluation(EVALUATE, ["checkpoint=runs/first", "evaluators=null"])


def test_what_is_told_by_the_data_or_by_a_metric_is_taken(yaml: Path) -> None:
    """A warm-up that may be longer than the run, SAM without autoresume, the way a metric is
    better.
    """
    for overrides in (
        ["max_duration=1ep"],
        ["scheduler.t_warmup=39ep"],
        ["max_duration=2ep", "train_subset_num_batches=3"],
        ["algorithms.SAM={}"],
    ):
        load(yaml, overrides)
    gap = ["save_folder=x", GAP]
    best = load(yaml, [*gap, "keep_best.metric=a/rmg"]).keep_best
    assert best is not None
    assert best.mode is None
    load(yaml, [*gap, "keep_best.metric=a/alignment_std", "keep_best.mode=min"])
