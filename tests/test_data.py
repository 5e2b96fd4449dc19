from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mds_sets import PAIR, edit, pair_rows, shards_of, write_rows
from PIL import Image
from runs import write_set
from s3 import S3Server
from streaming import StreamingDataLoader

from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.data.streams import check_streams
from alignclip.errors import NotReadError, UserError


def build(config: DataConfig, batch_size: int = 8, semantic: bool = True) -> ImageTextDataset:
    return ImageTextDataset(
        config, batch_size=batch_size, image_size=32, context_length=20, semantic=semantic
    )


def loader_of(config: DataConfig, **settings: Any) -> StreamingDataLoader:
    return build_dataloader(build(config, **settings), config, pin_memory=False)


def config_for(*folders: Path | str, **settings: object) -> DataConfig:
    streams = {
        f"s{i}": StreamConfig(remote=str(f)) if "://" in str(f) else StreamConfig(local=str(f))
        for i, f in enumerate(folders)
    }
    base = DataConfig(streams=streams, num_canonical_nodes=1, num_workers=0)
    return replace(base, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "a"
    write_set(str(folder), 64)
    return folder


def test_batches(local_set: Path) -> None:
    loader = loader_of(config_for(local_set))
    one, two = (list(loader) for _ in range(2))
    assert len(one) == len(loader) == 8
    lengths = [int(batch["text"].argmax(dim=1).max()) + 1 for batch in one]
    assert [batch.pop("text_length") for batch in one] == lengths
    shapes = {name: (tuple(part.shape), part.dtype) for name, part in one[0].items()}
    assert shapes == {
        "image": ((8, 3, 32, 32), torch.uint8),
        "text": ((8, 20), torch.int64),
        "sample": ((8,), torch.int64),
        "semantic": ((8, 16), torch.float16),
    }
    # epochs are shuffled and cropped differently
    first, second = (torch.cat([batch["image"] for batch in epoch]) for epoch in (one, two))
    assert not torch.equal(first, second)


def test_no_embeddings_where_none_are_needed(local_set: Path) -> None:
    assert build(config_for(local_set), semantic=False)[0].keys() == {"image", "text", "sample"}


def test_a_sample_depends_on_seed_epoch_and_id_alone(local_set: Path) -> None:
    dataset = build(config_for(local_set, scale=[0.3, 1.0]))
    first = dataset[5]["image"]
    torch.manual_seed(123)
    assert torch.equal(dataset[5]["image"], first)
    dataset.epoch = 1
    assert not torch.equal(dataset[5]["image"], first)
    other = build(config_for(local_set, scale=[0.3, 1.0], shuffle_seed=99))
    assert not torch.equal(other[5]["image"], first)


def test_embeddings_of_two_lengths_name_their_samples(local_set: Path, tmp_path: Path) -> None:
    write_set(str(tmp_path / "b"), 64, dimension=8, seed=1)
    dataset = build(config_for(local_set, tmp_path / "b"))
    says = r"sample '00001' has the shape \[8\], the one of sample '00005' \[16\]"
    with pytest.raises(NotReadError, match=says):
        dataset.batch_of([5, 65])


def test_a_batch_holds_the_bytes_of_one_image_at_a_time(
    local_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, rows = build(config_for(local_set)), []
    get_item = dataset.get_item

    def remember(at: int) -> dict[str, Any]:
        assert not any("image" in row for row in rows), "bytes of an image before"
        rows.append(get_item(at))
        return rows[-1]

    monkeypatch.setattr(dataset, "get_item", remember)
    assert len(dataset.batch_of([3, 1, 2])["image"]) == len(rows) == 3


def test_two_streams_with_proportions(local_set: Path, tmp_path: Path) -> None:
    write_set(str(tmp_path / "b"), 64, seed=1)
    config = config_for(local_set, tmp_path / "b", epoch_size="80")
    config.streams["s0"].proportion, config.streams["s1"].proportion = 0.75, 0.25
    dataset = build(config)
    drawn = [int(i) for i in dataset.resample_streams(0)[1]]
    assert len(drawn) == 80
    assert sum(i < 64 for i in drawn) == 60


def test_several_captions_draw_one_with_its_embedding(tmp_path: Path) -> None:
    captions = [f"caption number {i}" for i in range(4)]
    semantic = np.arange(4, dtype=np.float16)[:, None].repeat(3, axis=1)
    rows = [{**row, "caption": captions, "semantic": semantic} for row in pair_rows(24)]
    columns = {**PAIR, "caption": "json", "semantic": "ndarray:float16"}
    dataset = build(config_for(write_rows(tmp_path / "m", rows, columns)))
    drawn = set()
    for i in range(24):
        sample = dataset[i]
        row = int(sample["semantic"][0])
        assert torch.equal(sample["text"], dataset.tokenizer(captions[row])[0])
        drawn.add(row)
    assert drawn == {0, 1, 2, 3}


def test_a_batch_is_its_samples(tmp_path: Path) -> None:
    """Several captions, embeddings of zeros, images that can't be read or are no JPEGs."""
    rows = pair_rows(12)
    for i in (0, 3, 11):
        picture = Image.fromarray(np.full((40 + i, 50, 3), 20 * i, dtype=np.uint8))
        picture.save(tmp_path / "one.png")
        rows[i]["image"] = (tmp_path / "one.png").read_bytes()
    rows[4]["image"] = rows[5]["image"] = b"\xff\xd8\xff broken"
    captions = [f"caption number {i}!" for i in range(4)]
    semantic = np.arange(4, dtype=np.float16)[:, None].repeat(3, axis=1)
    rows = [{**row, "caption": captions, "semantic": semantic} for row in rows]
    columns = {**PAIR, "caption": "json", "semantic": "ndarray:float16"}
    dataset = build(config_for(write_rows(tmp_path / "m", rows, columns), scale=[0.2, 1.0]))
    ids = [7, 4, 0, 11, 5, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch, samples = dataset.batch_of(ids), [dataset[i] for i in ids]
    assert batch["sample"].tolist() == [7, 6, 0, 11, 6, 3]
    assert batch.pop("text_length") == max(int(one["text"].argmax()) + 1 for one in samples)
    assert {name: one.tolist() for name, one in batch.items()} == {
        name: [sample[name].tolist() for sample in samples] for name in samples[0]
    }
    # rows of the same replacement are cropped by the draws of the samples that were asked for
    assert not torch.equal(batch["image"][1], batch["image"][4])
    assert batch["image"].permute(0, 2, 3, 1).is_contiguous()  # as decoders and crops have it


def test_an_unreadable_image_is_replaced_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pair_rows(3)
    rows[1]["image"] = b"\xff\xd8\xff broken"
    dataset = build(config_for(write_rows(tmp_path / "m", rows)), semantic=False)
    sample = [dataset[1], dataset[1]][1]
    (line,) = capsys.readouterr().err.splitlines()  # once
    assert line.startswith("sample '1' has no readable image (")
    assert torch.equal(sample["text"], dataset.tokenizer("number 2")[0])


@pytest.mark.parametrize("caption", [None, [], 7, {"en": "a dog"}, ["a dog", None]], ids=repr)
def test_a_sample_without_a_caption_is_replaced_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caption: Any
) -> None:
    """A run would meet the sample again at each start."""
    rows = pair_rows(3)
    rows[1]["caption"] = caption
    place = write_rows(tmp_path / "m", rows, {**PAIR, "caption": "json"})
    dataset = build(config_for(place), semantic=False)
    sample = [dataset[1], dataset[1]][1]
    assert capsys.readouterr().err == f"sample '1' has no caption but {caption}\n"
    assert torch.equal(sample["text"], dataset.tokenizer("number 2")[0])


def test_captions_and_embeddings_that_do_not_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(i: int, count: int, dimension: int = 3) -> dict[str, Any]:
        semantic = np.ones((count, dimension), dtype=np.float16)
        return {**pair_rows(4)[i], "caption": ["a", "b"], "semantic": semantic}

    rows = [row(0, 2), row(1, 1), row(2, 2), row(3, 2, dimension=4)]
    columns = {**PAIR, "caption": "json", "semantic": "ndarray:float16"}
    config = config_for(write_rows(tmp_path / "m", rows, columns))
    assert build(config).batch_of([0, 1])["sample"].tolist() == [0, 2]
    assert capsys.readouterr().err == "sample '1' has 2 captions, but 1 caption embeddings\n"
    # a set that is read without its embeddings needs none
    assert build(config, semantic=False).batch_of([0, 1, 3])["sample"].tolist() == [0, 1, 3]
    with pytest.raises(NotReadError, match=r"^the caption embedding of sample '3' has the shape "):
        build(config).batch_of([0, 3])


def test_a_set_of_samples_that_can_not_be_trained_on(tmp_path: Path) -> None:
    rows = [{**row, "image": b"broken"} for row in pair_rows(3)]
    config = config_for(write_rows(tmp_path / "m", rows), num_workers=1)
    says = r"^none of 3 samples in a row, from sample \d on, can be trained on: .* no readable"
    with pytest.raises(NotReadError, match=says):
        list(loader_of(config, batch_size=2, semantic=False))


@pytest.mark.parametrize(
    ("epoch_size", "says"),
    [
        (None, "the set has 64 samples, fewer than one batch; lower global_train_batch_size to 64"),
        ("10", r"an epoch \(data.epoch_size, .*\) has 10 samples, .* to 10 or less \(it is 65"),
    ],
)
def test_fewer_samples_than_a_batch(local_set: Path, epoch_size: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        loader_of(config_for(local_set, epoch_size=epoch_size), batch_size=65)


class Remote:
    """A set in a bucket, read through a cache of its own."""

    def __init__(self, s3: S3Server, cache: Path) -> None:
        self.place = f"{s3.bucket()}/set"
        write_set(self.place, 64)
        self.bucket = self.place.removeprefix("s3://").split("/")[0]
        self.shards = [key for key in s3.keys(self.place) if key.endswith(".mds")]
        assert len(self.shards) > 3
        self.cache, self.client = cache, s3.client

    def config(self, **settings: object) -> DataConfig:
        config = config_for(self.place, **settings)
        config.streams["s0"].local = str(self.cache)
        return config

    def remove(self, *keys: str) -> None:
        for key in keys:
            self.client.delete_object(Bucket=self.bucket, Key=key)


@pytest.fixture
def remote(s3: S3Server, tmp_path: Path) -> Remote:
    return Remote(s3, tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_is_an_error_with_its_cause(remote: Remote, workers: int) -> None:
    remote.remove(remote.shards[1])
    with pytest.raises(
        NotReadError, match=rf"^can't read s3://.*{Path(remote.shards[1]).name}: not "
    ):
        list(loader_of(remote.config(num_workers=workers)))
    gc.collect()  # the loader goes here, and not in another test


@pytest.mark.slow
def test_both_download_threads_may_fail(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is slow to tell that it failed, so the second tries the same shard: an error,
    and no hang.
    """
    remote.remove(*remote.shards)
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
    dataset, raised = build(remote.config()), []

    def read() -> None:
        with pytest.raises(NotReadError, match=r"^can't read s3://") as error:
            list(dataset)
        raised.append(error.value)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert (len(raised), len(failures), None in failures) == (1, 2, False)


@pytest.mark.slow
def test_an_outage_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    """The server goes away when some shards are read, and comes back: nobody notices.

    In a process of its own.
    """
    remote = f"{s3.bucket()}/outage"
    write_set(remote, 400)
    script = f"""
        import sys
        from alignclip.config.schema import DataConfig, StreamConfig
        from alignclip.data.dataset import ImageTextDataset, build_dataloader
        stream = StreamConfig(remote={remote!r}, local={str(tmp_path / "cache")!r})
        config = DataConfig(
            streams={{"s": stream}}, num_canonical_nodes=1, num_workers=1,
            predownload=8, prefetch_factor=1, shuffle=False,
        )
        sizes = dict(batch_size=4, image_size=32, context_length=20)
        dataset = ImageTextDataset(config, **sizes, semantic=True)
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


MPNET = ("hub/mpnet", 16)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("models/mpnet", 16), None),
        ((None, None), None),
        (("hub/minilm", 16), "of 'hub/mpnet', data.streams.s1 of 'hub/minilm', which can't be"),
        (("hub/mpnet", 24), "dimension 16, data.streams.s1 of 24"),
    ],
    ids=str,
)
def test_streams_have_one_sentence_encoder(tmp_path: Path, other: Any, says: str | None) -> None:
    """Also where several captions an image leave the dimension out of the column's encoding."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, (encoder, dimension) in zip(folders, (MPNET, other), strict=True):
        write_set(str(folder), 4, dimension=dimension or 16)
        shards = shards_of(folder)
        for shard in shards:
            shard["column_encodings"] = [
                ":".join(one.split(":")[:2]) for one in shard["column_encodings"]
            ]
        edit(folder / "index.json", lambda index, shards=shards: index.update(shards=shards))
        if encoder:
            said = {"encoder": encoder, "dimension": dimension}
            (folder / "dataset.json").write_text(json.dumps(said))
    config = config_for(*folders)
    check_streams(config, semantic=False)
    if says is None:
        check_streams(config, semantic=True)
        return
    with pytest.raises(UserError, match=re.escape(says)):
        check_streams(config, semantic=True)


def refusal(config: DataConfig, semantic: bool = False) -> str:
    """What checking the streams says: one line."""
    with pytest.raises(UserError) as error:
        check_streams(config, semantic=semantic)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_sets_are_one_line(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, says = s3.bucket(), lambda *places: refusal(config_for(*places), semantic=True)
    nowhere = f"data.streams.s0: no MDS set at {tmp_path / 'nowhere'} (no index.json there)"
    assert says(tmp_path / "nowhere").startswith(nowhere)
    assert says(tmp_path / "nowhere").endswith("take it out with data.streams.s0=null")
    there = "s3://no-such-bucket-here/x"
    assert f"can't read {there}/index.json: no such bucket" in says(there)
    assert "not found" in says(f"{bucket}/no-such-set")
    write_set(f"{bucket}/plain", 4, columns="plain")
    assert "has no 'semantic' column" in says(f"{bucket}/plain")
    plain = config_for(f"{bucket}/plain")
    check_streams(plain, semantic=False)
    write_set(str(tmp_path / "cache"), 5, columns="plain")
    plain.streams["s0"].local = str(tmp_path / "cache")
    assert "holds another set than" in refusal(plain)
    (tmp_path / "odd").mkdir()
    for text in ("{", "[]", '{"shards": [{"basename": "x"}]}'):
        (tmp_path / "odd" / "index.json").write_text(text)
        assert "is not a streaming index" in says(tmp_path / "odd")
    for key, value in (("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", None)):
        with monkeypatch.context() as patch:
            patch.setenv(key, value) if value else patch.delenv(key)
            why = "access denied" if value else "no credentials found"
            assert why in says(f"{bucket}/plain")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"shuffle_algo": "py1x"}, "data.shuffle_algo=py1x does not exist; did you mean 'py1"),
        ({"validate_hash": "xxh46"}, "data.validate_hash=xxh46: did you mean 'xxh64'"),
    ],
)
def test_algorithms_are_looked_up_before_the_first_epoch(
    tmp_path: Path, setting: dict[str, str], says: str
) -> None:
    assert refusal(config_for(tmp_path, **setting)).startswith(says)


def test_more_workers_than_cores_are_said_in_one_line_with_the_key(
    local_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_for(local_set, num_workers=1000)
    dataset = build(config, semantic=False)
    with warnings.catch_warnings(record=True) as told:
        build_dataloader(dataset, config, pin_memory=False)
        monkeypatch.setenv("LOCAL_RANK", "1")
        build_dataloader(dataset, config, pin_memory=False)
    assert told == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.num_workers=1000, but a process may use ")
