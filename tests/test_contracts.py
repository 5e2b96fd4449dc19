"""What we use of other packages that they don't promise: each name is there, and is what we take it
for.

An upgrade that moves or changes one of these fails here first, with the place in our code that
has to be looked at. That we use the names rightly is for the tests of that place.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from typing import Any

import pytest
import torch
from packaging.version import Version

from alignclip.conversion.class_names import benchmark_lists
from alignclip.conversion.classification_sets import CLASSIFICATION_SETS
from alignclip.errors import UserError

# Each of our files, and below it the names that it uses. ``function(a b)`` has the parameters a and
# b, the source of ``Class: a b`` names the attributes a and b, ``name`` is there where it is
# imported. A deeper line goes on with the one above. A line that begins with ``torch<2.11:`` holds
# for these versions only: with a newer torch we don't use the name.
CONTRACTS = """
alignclip/training/composer_patches.py
    composer.utils.checkpoint.download_checkpoint(path node_checkpoint_folder object_store
        progress_bar)
    composer.utils.checkpoint.safe_torch_load(composer_states_filepath map_location
        load_monolith_rank0_only)
    composer.core.engine.Engine._close(state logger)
    composer.utils.collect_env.get_cpu_model()
    composer.utils.collect_env.get_composer_env_dict: get_cpu_model
    torch<2.11:
        torch.distributed.fsdp._fully_shard._fsdp_collectives._get_gradient_divide_factors(reduce_scatter_group
        all_reduce_group reduce_dtype device_type)
    composer.Trainer: _rng_state
    composer.algorithms.EMA: ema_model
    composer.algorithms.ema.ema.EMAParameters: named_parameters_dict named_buffers_dict
    composer.loggers.FileLogger: _is_newline _run_name _flush_queue file filename buffer_size
    torch._dynamo.config.optimize_ddp
    torch.optim.Adam.step(self closure)
    torch.optim.Adam: found_inf
    torch.optim.SGD: found_inf
alignclip/training/trainer.py
    composer.Trainer._iter_dataloader(self trainer_mode)
    composer.Trainer._train_batch(self use_grad_scaling)
    composer.Trainer._train_microbatches(self microbatches total_loss_dict ddp_sync)
    composer.Trainer._train_microbatch(self use_grad_scaling current_batch_size
        is_final_microbatch)
    composer.Trainer._accumulate_time_across_ranks(self num_samples num_tokens batch_time)
    composer.Trainer._use_grad_scaling(self precision scaler)
    composer.Trainer: _train_data_spec first_train_batch_complete
    composer.core.engine.Engine.run_marker_only_event(self event)
    composer.algorithms.sam.sam.SAMOptimizer.step(self closure)
alignclip/training/saver.py
    composer.utils.checkpoint.glob_filter(exclude_globs)
    composer.core.State._get_integrations_state_dict(self)
    composer.core.State._get_state_metadata(self)
    composer.callbacks.checkpoint_saver.CheckpointSaver._save_checkpoint(self state logger)
    composer.callbacks.checkpoint_saver.CheckpointSaver: save_interval last_checkpoint_batch
        start_batch filename folder weights_only
alignclip/training/speed.py
    composer.callbacks.speed_monitor.get_gpu_flops_available(state)
    composer.callbacks.speed_monitor.SpeedMonitor: divider total_eval_wct gpu_flops_available
alignclip/training/wandb_files.py
    wandb.sdk.internal.datastore.DataStore.open_for_scan(self fname)
    wandb.sdk.internal.datastore.DataStore.scan_data(self)
    wandb.sdk.internal.datastore.DataStore.close(self)
    wandb.proto.wandb_internal_pb2.Record
alignclip/training/evaluation_callback.py
    composer.algorithms.EMA.apply(self event state logger)
    composer.algorithms.EMA: ema_started
alignclip/runtime/stand_ins.py
    torch._disable_dynamo
alignclip/storage/hub.py
    huggingface_hub.errors.HTTPError
alignclip/data/workers.py
    torch.utils.data._utils.signal_handling._error_if_any_worker_fails
    torch.utils.data._utils.signal_handling._remove_worker_pids
    torch.utils.data.dataloader._MultiProcessingDataLoaderIter: _workers _shutdown _worker_pids_set
        _pin_memory_thread_done_event
alignclip/data/streaming_patches.py
    streaming.base.dataset.StreamingDataset.prepare_shard(self shard_id blocking)
    streaming.base.dataset.StreamingDataset._evict_coldest_shard(self)
    streaming.base.dataset.StreamingDataset._evict_shard(self shard_id)
    streaming.base.dataset.StreamingDataset._resume_incr_epoch(self)
    streaming.base.dataset.StreamingDataset.on_exception(self future)
    streaming.base.dataset.StreamingDataset.state_dict(self num_samples from_beginning)
    streaming.base.dataset.StreamingDataset: _cache_filelock _cache_filelock_path _shard_states
        _shard_access_times _event _iterator _unique_rank_world _locals_shm cache_usage
        shard_offset_per_stream shards_per_stream
alignclip/data/streaming_memory.py
    streaming.base.shared.prefix.get_shm_prefix(streams_local streams_remote world retry)
    streaming.base.shared.memory.SharedMemory.fix_register(self name rtype)
    streaming.base.shared.memory.SharedMemory.fix_unregister(self name rtype)
    streaming.base.shared.memory.SharedMemory.cleanup(self)
    multiprocessing.resource_tracker.ResourceTracker.register(self name rtype)
    multiprocessing.resource_tracker.ResourceTracker.unregister(self name rtype)
    streaming.base.shared.prefix._check_self(streams_local)
    streaming.base.shared.prefix._pack_locals(dirnames prefix_int)
    streaming.base.shared.prefix._unpack_locals(data)
    streaming.base.shared.prefix._get_path(prefix_int name)
    streaming.base.shared.SharedMemory.__init__(self name create size auto_cleanup)
    streaming.base.dataset.get_shm_prefix
alignclip/data/streaming_epoch.py
    streaming.base.dataset.StreamingDataset._prepare_thread(self it)
    streaming.base.dataset.StreamingDataset._ready_thread(self it)
    streaming.base.dataset.StreamingDataset._each_sample_id(self it)
    streaming.base.dataset.StreamingDataset.prepare_shard(self shard_id blocking)
    streaming.base.dataset.StreamingDataset._get_work(self epoch sample_in_epoch)
    streaming.base.dataset.StreamingDataset._resume_incr_epoch(self)
    streaming.base.dataset.StreamingDataset.on_exception(self future)
    streaming.base.dataset.StreamingDataset.__iter__: _prepare_thread _ready_thread
        _each_sample_id on_exception _event _executor _iterator _unique_worker_world
        _parallel_worker_world _unique_rank_world _parallel_rank_world detect_workers
    streaming.base.dataset._Iterator.exit(self)
    streaming.base.dataset.StreamingDataset: _shard_states _shard_access_times predownload spanner
    streaming.base.dataset._Iterator.on_exit(self)
    streaming.base.dataset._Iterator.should_exit(self)
    streaming.base.dataset._Iterator: prepare_index ready_index yield_index total sample_ids
    streaming.base.spanner.Spanner: shard_bounds
    streaming.base.shared.array.SharedArray.numpy(self)
alignclip/data/shard_cache.py
    streaming.base.format.base.reader.Reader.set_up_local(self listing safe_keep_zip)
    streaming.base.format.base.reader.Reader.get_max_size(self)
    streaming.base.format.base.reader.Reader.evict(self)
    streaming.base.format.mds.reader.MDSReader.from_json(dirname split obj)
    streaming.base.format.mds.reader.MDSReader.get_sample_data(self idx)
    streaming.base.format.mds.reader.MDSReader.decode_sample(self data)
    streaming.base.format.mds.encodings._get_coder(encoding)
    streaming.base.format.base.reader.JointReader: raw_data zip_data
alignclip/data/cached_stream.py
    streaming.base.stream.Stream.prepare_shard(self shard)
    streaming.base.stream.Stream.get_shards(self world allow_unsafe_types)
    streaming.base.stream.Stream.get_index_size(self)
    streaming.base.stream.Stream._download_file(self from_basename to_basename)
    streaming.base.stream.Stream: safe_keep_zip validate_hash
alignclip/data/batch.py
    torch.storage._StorageBase._new_shared(size device)
alignclip/conversion/mds_writer.py
    streaming.MDSWriter.encode_joint_shard(self)
    streaming.base.format.base.writer.Writer._process_file(self raw_data raw_basename
        zip_basename)
    streaming.base.format.base.writer.Writer._hash(self data basename)
    streaming.base.format.base.writer.Writer._write_index(self)
    streaming.base.format.base.writer.Writer: executor
    streaming.base.format.base.writer.JointWriter: new_samples extra_bytes_per_shard
        encode_joint_shard
    streaming.MDSWriter: config_data column_encodings
alignclip/evaluation/encoding.py
    torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers(self)
    torch.utils.data.dataloader._MultiProcessingDataLoaderIter: _workers
alignclip/evaluation/zero_shot.py
    clip_benchmark.metrics.zeroshot_classification.accuracy(output target topk)
alignclip/evaluation/retrieval.py
    clip_benchmark.metrics.zeroshot_retrieval.recall_at_k(scores positive_pairs k)
alignclip/model/blocks.py
    open_clip.transformer.ResidualAttentionBlock.forward(self q_x k_x v_x attn_mask)
    open_clip.transformer.ResidualAttentionBlock: ln_1 attn ls_1 ln_2 mlp ls_2
    open_clip.transformer.Transformer.forward(self x attn_mask)
    open_clip.transformer.Transformer: resblocks batch_first
    open_clip.transformer.VisionTransformer._embeds(self x)
    open_clip.transformer.VisionTransformer: transformer ln_post proj _pool
alignclip/model/optimization.py
    timm.models._manipulate.group_with_matcher(named_objects group_matcher return_values
        reverse)
alignclip/storage/clouds.py
    streaming.base.storage.upload.GCSUploader: gcs_client
    streaming.base.storage.upload.UPLOADERS
    streaming.base.storage.download.DOWNLOADER_MAPPINGS
alignclip/conversion/classification_sets.py
    torchvision.datasets.Flowers102: _image_files _labels
    torchvision.datasets.Food101: _image_files _labels
    torchvision.datasets.OxfordIIITPet: _images _labels
    torchvision.datasets.StanfordCars: _samples classes
"""


def contracts() -> list[tuple[str, str]]:
    """Return (our file, what it uses) for each line of the table."""
    found = []
    for line in CONTRACTS.strip().replace("\n" + " " * 8, " ").splitlines():
        if not line.startswith(" "):
            ours = line
        else:
            found.append((ours, line.strip()))
    return found


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


@pytest.mark.parametrize(("ours", "contract"), contracts(), ids=lambda text: text.split()[0])
def test_a_contract(ours: str, contract: str) -> None:
    look = f"look at {ours}: {contract}"
    if limit := re.match(r"torch<([\d.]+): ", contract):
        if Version(torch.__version__) >= Version(limit[1]):
            pytest.skip("we don't use it with this version of torch")
        contract = contract.removeprefix(limit[0])
    function, is_function, parameters = contract.rstrip(")").partition("(")
    name, _, attributes = function.partition(": ")
    try:
        found = find(name)
        names = [one for one in parameters_of(name) if one != "cls"] if is_function else []
    except (AttributeError, ModuleNotFoundError, ValueError):
        pytest.fail(f"{name} is gone: {look}")
    assert names == parameters.split(), look
    source = inspect.getsource(found) if attributes else ""
    assert [one for one in attributes.split() if not re.search(rf"\b{one}\b", source)] == [], look


def test_states_of_a_shard() -> None:
    """``alignclip/data/streaming_patches.py`` gives a shard whose download failed back to
    others.
    """
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
    look = (
        f"datasets/{file} of clip_benchmark has changed: look at "
        f"alignclip/conversion/class_names.py"
    )
    try:
        found = benchmark_lists(file).get(name)
    except (FileNotFoundError, UserError):
        pytest.fail(look)
    assert isinstance(found, list), f"{look}, at '{name}'"
    assert len(found) == count, f"{look}, at '{name}'"
    if "templates" in file:
        assert all("{c}" in template for template in found), f"{look}, at '{name}'"


def test_sets_that_clip_benchmark_has_no_templates_for() -> None:
    """They get ImageNet's. A set of ours that is neither here nor above has templates to look
    at.
    """
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
