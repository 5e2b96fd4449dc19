from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import jpeg, write_set
from s3 import S3Server
from streaming import MDSWriter

from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.data.streams import check_streams
from alignclip.errors import UserError

Build = Callable[..., ImageTextDataset]


@pytest.fixture
def build() -> Iterator[Build]:
    """Datasets of this process; their shared memory goes with the test."""
    made: list[ImageTextDataset] = []

    def build(config: DataConfig, batch_size: int = 8, semantic: bool = True) -> ImageTextDataset:
        made.append(
            ImageTextDataset(
                config, batch_size=batch_size, image_size=32, context_length=20, semantic=semantic
            )
        )
        return made[-1]

    yield build
    for dataset in made:
        dataset._locals_shm.cleanup()


def config_for(*folders: Path | str, **settings: object) -> DataConfig:
    streams = {
        f"s{i}": StreamConfig(remote=str(f)) if "://" in str(f) else StreamConfig(local=str(f))
        for i, f in enumerate(folders)
    }
    base = DataConfig(streams=streams, num_canonical_nodes=1, num_workers=0, download_retry=1)
    return replace(base, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "a"
    write_set(str(folder), 64)
    return folder


def test_batches(local_set: Path, build: Build) -> None:
    config = config_for(local_set)
    loader = build_dataloader(build(config), config, pin_memory=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 8
    batch = batches[0]
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["text"].shape == (8, 20)
    assert batch["text"].dtype == torch.int64
    assert batch["semantic"].shape == (8, 16)
    assert batch["semantic"].dtype == torch.float16


def test_no_embeddings_where_none_are_needed(local_set: Path, build: Build) -> None:
    assert build(config_for(local_set), semantic=False)[0].keys() == {"image", "text", "sample"}


def test_a_sample_depends_on_seed_epoch_and_id_alone(local_set: Path, build: Build) -> None:
    dataset = build(config_for(local_set, scale=[0.3, 1.0]))
    first = dataset[5]["image"]
    torch.manual_seed(123)
    assert torch.equal(dataset[5]["image"], first)
    dataset.epoch = 1
    assert not torch.equal(dataset[5]["image"], first)
    other = build(config_for(local_set, scale=[0.3, 1.0], shuffle_seed=99))
    assert not torch.equal(other[5]["image"], first)


def test_epochs_are_shuffled_and_cropped_differently(local_set: Path, build: Build) -> None:
    config = config_for(local_set)
    loader = build_dataloader(build(config), config, pin_memory=False)
    one, two = (torch.cat([b["image"] for b in loader]) for _ in range(2))
    assert not torch.equal(one, two)


def test_two_streams_with_proportions(local_set: Path, tmp_path: Path, build: Build) -> None:
    write_set(str(tmp_path / "b"), 64, seed=1)
    config = config_for(local_set, tmp_path / "b", epoch_size="80")
    config.streams["s0"].proportion, config.streams["s1"].proportion = 0.75, 0.25
    dataset = build(config)
    drawn = [int(i) for i in dataset.resample_streams(0)[1]]
    assert len(drawn) == 80
    assert sum(i < 64 for i in drawn) == 60


def test_several_captions_draw_one_with_its_embedding(tmp_path: Path, build: Build) -> None:
    captions = [f"caption number {i}" for i in range(4)]
    columns = {"key": "str", "image": "bytes", "caption": "json", "semantic": "ndarray:float16"}
    with MDSWriter(out=str(tmp_path / "m"), columns=columns, hashes=["xxh64"]) as writer:
        for i in range(24):
            rows = np.arange(4, dtype=np.float16)[:, None].repeat(3, axis=1)
            writer.write(
                {
                    "key": str(i),
                    "image": jpeg(np.random.default_rng(i)),
                    "caption": captions,
                    "semantic": rows,
                }
            )
    dataset = build(config_for(tmp_path / "m"))
    drawn = set()
    for i in range(24):
        sample = dataset[i]
        row = int(sample["semantic"][0])
        assert torch.equal(sample["text"], dataset.tokenizer(captions[row])[0])
        drawn.add(row)
    assert drawn == {0, 1, 2, 3}


def test_an_unreadable_image_is_replaced_and_said(tmp_path: Path, build: Build) -> None:
    columns = {"key": "str", "image": "bytes", "caption": "str"}
    with MDSWriter(out=str(tmp_path / "m"), columns=columns, hashes=["xxh64"]) as writer:
        for i in range(3):
            image = b"\xff\xd8\xff broken" if i == 1 else jpeg(np.random.default_rng(i))
            writer.write({"key": f"k{i}", "image": image, "caption": f"number {i}"})
    dataset = build(config_for(tmp_path / "m"), semantic=False)
    with pytest.warns(UserWarning, match="sample 'k1' has no readable image"):
        sample = dataset[1]
    assert torch.equal(sample["text"], dataset.tokenizer("number 2")[0])


def test_fewer_samples_than_a_batch(local_set: Path, build: Build) -> None:
    config = config_for(local_set)
    with pytest.raises(UserError, match="the set has 64 samples, fewer than one batch"):
        build_dataloader(build(config, batch_size=65), config, pin_memory=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_is_an_error_with_its_cause(
    s3: S3Server, build: Build, workers: int, tmp_path: Path
) -> None:
    remote = f"{s3.bucket()}/gone"
    write_set(remote, 64)
    bucket = remote.removeprefix("s3://").split("/")[0]
    shards = [key for key in s3.keys(remote) if key.endswith(".mds")]
    assert len(shards) > 3
    s3.client.delete_object(Bucket=bucket, Key=shards[1])
    config = config_for(remote, num_workers=workers)
    config.streams["s0"].local = str(tmp_path / "cache")
    loader = build_dataloader(build(config), config, pin_memory=False)
    with pytest.raises(RuntimeError, match=rf"reading s3://.*{Path(shards[1]).name}"):
        list(loader)


def test_both_download_threads_may_fail(
    s3: S3Server, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is slow to tell that it failed, so the second tries the same shard: an error, and no hang."""
    remote = f"{s3.bucket()}/gone"
    write_set(remote, 64)
    bucket = remote.removeprefix("s3://").split("/")[0]
    for key in s3.keys(remote):
        if key.endswith(".mds"):
            s3.client.delete_object(Bucket=bucket, Key=key)
    config = config_for(remote, download_retry=1)
    config.streams["s0"].local = str(tmp_path / "cache")
    failures: list[BaseException | None] = []
    note, follow = ImageTextDataset.on_exception, ImageTextDataset._ready_thread

    def slow_note(dataset: ImageTextDataset, future: Future[None]) -> None:
        failures.append(future.exception())
        time.sleep(2)
        note(dataset, future)

    def late_follow(dataset: ImageTextDataset, iterator: Any) -> None:
        while not failures:
            time.sleep(0.01)
        follow(dataset, iterator)

    monkeypatch.setattr(ImageTextDataset, "on_exception", slow_note)
    monkeypatch.setattr(ImageTextDataset, "_ready_thread", late_follow)
    dataset, raised = build(config), []

    def read() -> None:
        with pytest.raises(RuntimeError, match="reading s3://") as error:
            list(dataset)
        raised.append(error.value)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(raised) == 1
    assert len(failures) == 2
    assert None not in failures


def test_a_broken_shard_is_an_error(s3: S3Server, build: Build, tmp_path: Path) -> None:
    remote = f"{s3.bucket()}/broken"
    write_set(remote, 64)
    bucket = remote.removeprefix("s3://").split("/")[0]
    shard = next(key for key in s3.keys(remote) if key.endswith(".mds"))
    body = bytearray(s3.client.get_object(Bucket=bucket, Key=shard)["Body"].read())
    body[len(body) // 2] ^= 1
    s3.client.put_object(Bucket=bucket, Key=shard, Body=bytes(body))
    config = config_for(remote)
    config.streams["s0"].local = str(tmp_path / "cache")
    loader = build_dataloader(build(config), config, pin_memory=False)
    with pytest.raises(RuntimeError, match="Checksum failure"):
        list(loader)


def test_an_outage_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    """The server goes away when some shards are read, and comes back: nobody notices. In a process of its own."""
    remote = f"{s3.bucket()}/outage"
    write_set(remote, 400)
    script = f"""
        import sys
        from alignclip.config.schema import DataConfig, StreamConfig
        from alignclip.data.dataset import ImageTextDataset, build_dataloader
        stream = StreamConfig(remote={remote!r}, local={str(tmp_path / "cache")!r})
        config = DataConfig(
            streams={{"s": stream}}, num_canonical_nodes=1, num_workers=1, download_retry=6, download_timeout=2.0,
            predownload=8, prefetch_factor=1, shuffle=False,
        )
        dataset = ImageTextDataset(config, batch_size=4, image_size=32, context_length=20, semantic=True)
        for i, batch in enumerate(build_dataloader(dataset, config, pin_memory=False)):
            print("batch", i, flush=True)
            if i == 1:
                sys.stdin.readline()
    """
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        assert [reader.stdout.readline() for _ in range(2)] == ["batch 0\n", "batch 1\n"]
        s3.stop()
        reader.stdin.write("go on\n")
        reader.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            reader.wait(2)
    finally:
        s3.start()
    rest, _ = reader.communicate(timeout=120)
    assert rest.split("\n")[-2] == "batch 99"
    assert reader.returncode == 0


@pytest.mark.parametrize(
    ("encoders", "says"),
    [
        ((("hub/mpnet", 16), ("models/mpnet", 16)), None),
        ((("hub/mpnet", 16), (None, None)), None),
        (
            (("hub/mpnet", 16), ("hub/minilm", 16)),
            "of 'hub/mpnet', data.streams.s1 of 'hub/minilm', which can't be",
        ),
        ((("hub/mpnet", 16), ("hub/mpnet", 24)), "dimension 16, data.streams.s1 of 24"),
    ],
    ids=str,
)
def test_streams_have_one_sentence_encoder(tmp_path: Path, encoders: Any, says: str | None) -> None:
    """Also where several captions an image leave the dimension out of the column's encoding."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, (encoder, dimension) in zip(folders, encoders, strict=True):
        write_set(str(folder), 4, dimension=dimension or 16)
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shards"]:
            shard["column_encodings"] = [
                one.partition(":16")[0].partition(":24")[0] for one in shard["column_encodings"]
            ]
        (folder / "index.json").write_text(json.dumps(index))
        if encoder:
            (folder / "dataset.json").write_text(
                json.dumps({"encoder": encoder, "dimension": dimension})
            )
    if says is None:
        check_streams(config_for(*folders), semantic=True)
        return
    with pytest.raises(UserError, match=re.escape(says)):
        check_streams(config_for(*folders), semantic=True)
    check_streams(config_for(*folders), semantic=False)


def test_a_short_epoch_is_not_taken_for_a_short_set(tmp_path: Path) -> None:
    write_set(str(tmp_path), 70)
    config = config_for(tmp_path, epoch_size="10", num_workers=0)
    dataset = ImageTextDataset(
        config, batch_size=16, image_size=32, context_length=20, semantic=False
    )
    with pytest.raises(
        UserError,
        match=r"an epoch \(data.epoch_size, .*\) has 10 samples, .* to 10 or less \(it is 16",
    ):
        build_dataloader(dataset, config, pin_memory=False)


def test_missing_sets_are_one_line(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*folders: Path | str, semantic: bool = True) -> str:
        with pytest.raises(UserError) as error:
            check_streams(config_for(*folders), semantic=semantic)
        assert "\n" not in str(error.value)
        return str(error.value)

    nowhere = f"data.streams.s0: no MDS set at {tmp_path / 'nowhere'} (no index.json there)"
    assert says(tmp_path / "nowhere").startswith(nowhere)
    assert says(tmp_path / "nowhere").endswith("take it out with data.streams.s0=null")
    assert "can't read s3://no-such-bucket-here/x/index.json: no such bucket" in says(
        "s3://no-such-bucket-here/x"
    )
    with pytest.raises(
        UserError, match=r"data\.shuffle_algo=py1x does not exist; did you mean 'py1"
    ):
        check_streams(config_for(tmp_path, shuffle_algo="py1x"), semantic=False)
    with pytest.raises(UserError, match=r"data\.validate_hash=xxh46: did you mean 'xxh64'"):
        check_streams(config_for(tmp_path, validate_hash="xxh46"), semantic=False)
    bucket = s3.bucket()
    assert "not found" in says(f"{bucket}/no-such-set")
    write_set(f"{bucket}/plain", 4, columns="plain")
    assert "has no 'semantic' column" in says(f"{bucket}/plain")
    plain = config_for(f"{bucket}/plain")
    check_streams(plain, semantic=False)
    write_set(str(tmp_path / "cache"), 5, columns="plain")
    plain.streams["s0"].local = str(tmp_path / "cache")
    with pytest.raises(UserError, match="holds another set than"):
        check_streams(plain, semantic=False)
    (tmp_path / "odd").mkdir()
    for text in ("{", "[]", '{"shards": [{"basename": "x"}]}'):
        (tmp_path / "odd" / "index.json").write_text(text)
        assert "is not a streaming index" in says(tmp_path / "odd")
    write_set(str(tmp_path / "a"), 4, dimension=16)
    write_set(str(tmp_path / "b"), 4, dimension=24)
    assert "caption embeddings of dimension 16, data.streams.s1 of 24" in says(
        tmp_path / "a", tmp_path / "b"
    )
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "access denied" in says(f"{bucket}/plain")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.delenv("AWS_ACCESS_KEY_ID")
        assert "no credentials found" in says(f"{bucket}/plain")


def test_more_workers_than_cores_are_said_in_one_line_with_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(str(tmp_path / "set"), count=16)
    config = config_for(tmp_path / "set")
    config.num_workers = 1000
    dataset = ImageTextDataset(
        config, batch_size=4, image_size=32, context_length=77, semantic=False
    )
    with warnings.catch_warnings(record=True) as told:
        build_dataloader(dataset, config, pin_memory=False)
        monkeypatch.setenv("LOCAL_RANK", "1")
        build_dataloader(dataset, config, pin_memory=False)
    assert told == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.num_workers=1000, but a process may use ")
