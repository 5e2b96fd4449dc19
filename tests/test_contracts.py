"""What we use of other packages that they don't promise: each name is there, and is what we take it for.

An upgrade that moves or changes one of these fails here first, with the place in our code that
has to be looked at. That we use the names rightly is for the tests of that place.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from alignclip.conversion.class_names import benchmark_lists
from alignclip.conversion.classification_sets import CLASSIFICATION_SETS
from alignclip.errors import UserError


@dataclass(frozen=True)
class Function:
    """A function or class that is replaced, overridden or called.

    Attributes:
        name: dotted.
        parameters: names of its parameters, in their order.
        used_by: our file, to be looked at when this fails.
    """

    name: str
    parameters: str
    used_by: str


@dataclass(frozen=True)
class Attribute:
    """Attributes that the source of a class or function names.

    Attributes:
        name: of the class or function, dotted.
        attributes: their names.
        used_by: our file, to be looked at when this fails.
    """

    name: str
    attributes: str
    used_by: str


CHECKPOINT = "composer.utils.checkpoint"
UPLOADER = "composer.utils.remote_uploader"
SAVER = "composer.callbacks.checkpoint_saver.CheckpointSaver"
DATASET = "streaming.base.dataset.StreamingDataset"
PREFIX = "streaming.base.shared.prefix"
STREAM = "streaming.base.stream.Stream"
READER = "streaming.base.format.base.reader.Reader"
WRITER = "streaming.base.format.base.writer"
CLOUDS = "alignclip/storage/clouds.py"
FSDP = "torch.distributed.fsdp._fully_shard._fsdp_collectives"
LOADER = "torch.utils.data.dataloader._MultiProcessingDataLoaderIter"
PATCHES, CACHE = "alignclip/training/composer_patches.py", "alignclip/data/shard_cache.py"
STREAMING = "alignclip/data/streaming_patches.py"

FUNCTIONS = [
    Function(f"{CHECKPOINT}.save_checkpoint", "state filename weights_only ignore_keys", PATCHES),
    Function(f"{CHECKPOINT}._write_checkpoint_file", "state_dict filename", PATCHES),
    Function(
        f"{CHECKPOINT}.download_checkpoint",
        "path node_checkpoint_folder object_store progress_bar",
        PATCHES,
    ),
    Function(
        f"{CHECKPOINT}.safe_torch_load",
        "composer_states_filepath map_location load_monolith_rank0_only",
        PATCHES,
    ),
    Function(
        f"{CHECKPOINT}._torch_load_with_validation", "checkpoint_filepath map_location", PATCHES
    ),
    Function("composer.core.engine.Engine._close", "state logger", PATCHES),
    Function(
        f"{UPLOADER}._upload_file_to_object_store",
        "remote_backend_name backend_kwargs remote_file_name local_file_path overwrite num_attempts",
        PATCHES,
    ),
    Function(
        "composer.utils.file_helpers.validate_credentials",
        "remote_backend remote_file_name_to_test",
        PATCHES,
    ),
    Function(f"{UPLOADER}.RemoteUploader.wait_and_close", "self", "alignclip/training/saver.py"),
    Function(f"{SAVER}._save_checkpoint", "self state logger", "alignclip/training/saver.py"),
    Function(
        f"{SAVER}._upload_checkpoint",
        "self remote_file_name local_file_name local_remote_file_names logger",
        "alignclip/training/saver.py",
    ),
    Function(
        "composer.algorithms.EMA.apply",
        "self event state logger",
        "alignclip/training/evaluation_callback.py",
    ),
    Function(f"{DATASET}.prepare_shard", "self shard_id blocking", STREAMING),
    Function(f"{DATASET}._evict_coldest_shard", "self", STREAMING),
    Function(f"{DATASET}._evict_shard", "self shard_id", STREAMING),
    Function(f"{DATASET}._ready_thread", "self it", STREAMING),
    Function(f"{DATASET}._resume_incr_epoch", "self", STREAMING),
    Function(f"{DATASET}.on_exception", "self future", STREAMING),
    Function(f"{DATASET}.state_dict", "self num_samples from_beginning", STREAMING),
    Function("streaming.base.dataset._Iterator.on_exit", "self", STREAMING),
    Function("streaming.base.dataset._Iterator.should_exit", "self", STREAMING),
    Function(
        f"{PREFIX}.get_shm_prefix",
        "streams_local streams_remote world retry",
        STREAMING,
    ),
    Function(f"{PREFIX}._check_self", "streams_local", STREAMING),
    Function(
        f"{PREFIX}._check_and_find_retrying",
        "streams_local streams_remote shm_name retry",
        STREAMING,
    ),
    Function(f"{PREFIX}._pack_locals", "dirnames prefix_int", STREAMING),
    Function(f"{PREFIX}._get_path", "prefix_int name", STREAMING),
    Function(
        "streaming.base.shared.SharedMemory.__init__",
        "self name create size auto_cleanup",
        STREAMING,
    ),
    Function(f"{STREAM}.prepare_shard", "self shard", CACHE),
    Function(f"{STREAM}.get_shards", "self world allow_unsafe_types", CACHE),
    Function(f"{STREAM}.get_index_size", "self", CACHE),
    Function(f"{STREAM}._download_file", "self from_basename to_basename", CACHE),
    Function(f"{READER}.set_up_local", "self listing safe_keep_zip", CACHE),
    Function(f"{READER}.get_max_size", "self", CACHE),
    Function(f"{READER}.evict", "self", CACHE),
    Function("streaming.base.format.mds.reader.MDSReader.from_json", "dirname split obj", CACHE),
    Function(
        "streaming.MDSWriter.encode_joint_shard", "self", "alignclip/conversion/mds_writer.py"
    ),
    Function(
        f"{WRITER}.Writer._process_file",
        "self raw_data raw_basename zip_basename",
        "alignclip/conversion/mds_writer.py",
    ),
    Function(f"{WRITER}.Writer._hash", "self data basename", "alignclip/conversion/mds_writer.py"),
    Function(
        f"{FSDP}._get_gradient_divide_factors",
        "reduce_scatter_group all_reduce_group reduce_dtype device_type",
        PATCHES,
    ),
    Function(f"{LOADER}._shutdown_workers", "self", "alignclip/evaluation/encoding.py"),
    Function(
        "clip_benchmark.metrics.zeroshot_classification.accuracy",
        "output target topk",
        "alignclip/evaluation/zero_shot.py",
    ),
    Function(
        "clip_benchmark.metrics.zeroshot_retrieval.recall_at_k",
        "scores positive_pairs k",
        "alignclip/evaluation/retrieval.py",
    ),
    Function(
        "timm.models._manipulate.group_with_matcher",
        "named_objects group_matcher return_values reverse",
        "alignclip/model/optimization.py",
    ),
]

ATTRIBUTES = [
    Attribute("composer.Trainer", "_rng_state", PATCHES),
    Attribute(
        "composer.loggers.FileLogger",
        "_is_newline _run_name _flush_queue file filename buffer_size",
        PATCHES,
    ),
    Attribute(
        SAVER,
        "symlink_upload_tasks saved_checkpoints last_checkpoint_batch start_batch remote_uploader "
        "_symlink_upload_wait_before_next_try_in_seconds",
        "alignclip/training/saver.py",
    ),
    Attribute(
        f"{UPLOADER}.RemoteUploader",
        "_upload_staging_folder upload_executor check_remote_files_exist_executor",
        "alignclip/training/saver.py",
    ),
    Attribute(
        "composer.algorithms.EMA", "ema_started", "alignclip/training/evaluation_callback.py"
    ),
    Attribute(
        DATASET,
        "_cache_filelock _cache_filelock_path _shard_states _shard_access_times _event _iterator "
        "_unique_rank_world _locals_shm cache_usage predownload spanner shard_offset_per_stream shards_per_stream",
        STREAMING,
    ),
    Attribute(
        "streaming.base.dataset._Iterator",
        "ready_index yield_index total sample_ids",
        STREAMING,
    ),
    Attribute(STREAM, "_downloader safe_keep_zip validate_hash", CACHE),
    Attribute("streaming.base.format.base.reader.JointReader", "raw_data zip_data", CACHE),
    Attribute(
        f"{WRITER}.JointWriter",
        "new_samples extra_bytes_per_shard encode_joint_shard",
        "alignclip/conversion/mds_writer.py",
    ),
    Attribute(
        "streaming.MDSWriter", "config_data column_encodings", "alignclip/conversion/mds_writer.py"
    ),
    Attribute("streaming.base.storage.upload.GCSUploader", "gcs_client", CLOUDS),
    Attribute(LOADER, "_workers", "alignclip/evaluation/encoding.py"),
    Attribute(
        "torchvision.datasets.Flowers102",
        "_image_files _labels",
        "alignclip/conversion/classification_sets.py",
    ),
    Attribute(
        "torchvision.datasets.FGVCAircraft",
        "_image_files _labels",
        "alignclip/conversion/classification_sets.py",
    ),
    Attribute(
        "torchvision.datasets.StanfordCars",
        "_samples classes",
        "alignclip/conversion/classification_sets.py",
    ),
]


def find(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def parameters_of(name: str) -> list[str]:
    """Names of a function's parameters, from the source: our own may stand in its place by now."""
    owner, _, function = name.rpartition(".")
    body = ast.parse(textwrap.dedent(inspect.getsource(find(owner)))).body
    if isinstance(body[0], ast.ClassDef):
        body = body[0].body
    (found,) = (
        node for node in body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    arguments = found.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


@pytest.mark.parametrize("contract", FUNCTIONS, ids=lambda contract: contract.name)
def test_functions(contract: Function) -> None:
    try:
        found = parameters_of(contract.name)
    except (AttributeError, ModuleNotFoundError, ValueError):
        pytest.fail(f"{contract.name} is gone: look at {contract.used_by}")
    expected = [name for name in contract.parameters.split() if name != "cls"]
    look = f"{contract.name} has changed: look at {contract.used_by}"
    assert [name for name in found if name != "cls"] == expected, look


@pytest.mark.parametrize("contract", ATTRIBUTES, ids=lambda contract: contract.name)
def test_attributes(contract: Attribute) -> None:
    source = inspect.getsource(find(contract.name))
    missing = [name for name in contract.attributes.split() if name not in source]
    assert not missing, f"{contract.name} has no {missing} any more: look at {contract.used_by}"


@pytest.mark.parametrize(
    ("module", "name", "used_by"),
    [
        ("composer.utils.remote_uploader", "validate_credentials", PATCHES),
        ("streaming.base.dataset", "get_shm_prefix", STREAMING),
        ("streaming.base.shared.prefix", "SharedMemory", STREAMING),
        ("torch._dynamo.config", "optimize_ddp", PATCHES),
        ("streaming.base.storage.upload", "UPLOADERS", CLOUDS),
        ("streaming.base.storage.download", "DOWNLOADER_MAPPINGS", CLOUDS),
    ],
)
def test_names_that_are_replaced_or_read_where_they_are_imported(
    module: str, name: str, used_by: str
) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"{module}.{name} is gone: look at {used_by}"
    )


def test_states_of_a_shard() -> None:
    """``alignclip/data/streaming_patches.py`` gives a shard whose download failed back to others."""
    from streaming.base.dataset import _ShardState

    assert {state.name for state in _ShardState} == {"INVALID", "REMOTE", "PREPARING", "LOCAL"}


# clip_benchmark's file -> set -> how many class names or templates; alignclip/conversion looks
# them up, and would take ImageNet's templates for a set whose name has changed
BENCHMARK_LISTS = {
    "en_classnames.json": {"imagenet1k": 1000, "flowers": 102, "pets": 37},
    "en_zeroshot_classification_templates.json": {
        "imagenet1k": 80,
        "cifar10": 18,
        "cifar100": 18,
        "cars": 8,
        "flowers": 1,
        "food101": 1,
        "pets": 1,
    },
}
LISTS = [(file, name, count) for file, of in BENCHMARK_LISTS.items() for name, count in of.items()]


@pytest.mark.parametrize(("file", "name", "count"), LISTS)
def test_clip_benchmarks_lists(file: str, name: str, count: int) -> None:
    look = f"datasets/{file} of clip_benchmark has changed: look at alignclip/conversion/class_names.py"
    try:
        found = benchmark_lists(file).get(name)
    except (FileNotFoundError, UserError):
        pytest.fail(look)
    assert isinstance(found, list), f"{look}, at '{name}'"
    assert len(found) == count, f"{look}, at '{name}'"
    if "templates" in file:
        assert all("{c}" in template for template in found), f"{look}, at '{name}'"


def test_sets_that_clip_benchmark_has_no_templates_for() -> None:
    """They get ImageNet's. A set of ours that is neither here nor above has templates to look at."""
    known = BENCHMARK_LISTS["en_zeroshot_classification_templates.json"]
    generic = {"fashion_mnist", "folder", "imagenetv2", "imagenet-sketch"}
    generic |= {f"imagenet-{letter}" for letter in "aro"}
    assert CLASSIFICATION_SETS.keys() == known.keys() | generic
    assert generic.isdisjoint(benchmark_lists("en_zeroshot_classification_templates.json"))


def test_timms_mark_of_a_parameter_that_belongs_to_the_block_before() -> None:
    """``alignclip/model/optimization.py`` gives these parameters the depth of timm's own groups."""
    from timm.models._manipulate import MATCH_PREV_GROUP

    assert MATCH_PREV_GROUP == (99999,)


def test_batch_norms_have_one_base() -> None:
    """``alignclip/model/encoders.py`` finds a batch norm of any number of dimensions."""
    from torch.nn.modules.batchnorm import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        SyncBatchNorm,
        _BatchNorm,
    )

    assert all(
        issubclass(one, _BatchNorm)
        for one in (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
    )
