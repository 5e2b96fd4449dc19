"""Say what is known of a batch that is not finite: the terms, the samples, the parameters."""

from __future__ import annotations

from alignclip.errors import few
from alignclip.ranks import gather_objects, world_size

# what a sample may have that is not finite, and its words
OF_SAMPLES = {
    "semantic": "a caption embedding ('semantic')",
    "image": "image features",
    "text": "text features",
}
FIRST_SAMPLE = "first"  # the first sample of a rank's batch, in Names

# Names by what is not finite: parameters of "gradients" and "weights", else keys of samples
Names = dict[str, list[str]]


def of_all_ranks(mine: Names) -> Names:
    """Join the names of all ranks, each name once; a sample's says which rank has it.

    The first samples of batches are left out where a sample is at fault.
    """
    joined: dict[str, dict[str, None]] = {}
    for rank, found in enumerate(gather_objects([mine])):
        for kind, names in found.items():
            if kind in OF_SAMPLES or kind == FIRST_SAMPLE:
                where = f" (rank {rank})" if world_size() > 1 else ""
                names = [f"'{name}'{where}" for name in names]
            joined.setdefault(kind, {}).update(dict.fromkeys(names))
    if any(joined.get(kind) for kind in OF_SAMPLES):
        joined.pop(FIRST_SAMPLE, None)
    return {kind: list(names) for kind, names in joined.items()}


def what(losses: dict[str, float], names: Names, parameters: int) -> str:
    """Say what is not finite.

    Args:
        losses: the terms; none where they are finite.
        names: of all ranks.
        parameters: how many are trained.
    """
    parts = []
    if losses:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        parts.append(f"the loss is not finite: {terms}")
    for kind, words in OF_SAMPLES.items():
        if keys := names.get(kind):
            whose = f"samples {few(keys)} have" if len(keys) > 1 else f"sample {keys[0]} has"
            parts.append(f"{whose} {words} not finite")
    if gradients := names.get("gradients"):
        which = f"{len(gradients)} of {parameters} parameters ({few(gradients)})"
        parts.append(f"not finite are the gradients of {which}")
    if weights := names.get("weights"):
        parts.append(f"after the step not finite are the weights {few(weights)}")
    if first := names.get(FIRST_SAMPLE):
        begins = "samples" if len(first) > 1 else "sample"
        parts.append(f"the batch begins with {begins} {few(first)}")
    return "; ".join(parts)


def way_out(names: Names, saved: int | None) -> str:
    """Say what is kept of a run that ends, and what a person can do.

    Args:
        names: of all ranks.
        saved: batches in the newest checkpoint; None where nothing is saved.
    """
    kept = ""
    if saved is not None:
        kept = f"The run is saved up to batch {saved}; the same command goes on from there"
    if names.get("weights"):
        kept = "Nothing of this batch is saved; the same command goes on from the last checkpoint"
    if names.get("semantic"):
        kept += ", once these samples are out of the set (convert/verify.py finds all of them)"
    elif any(names.get(kind) for kind in OF_SAMPLES):
        kept += ", once these samples are out of the set, or fit"
    else:
        kept += (
            ". A lower optimizer.lr, a longer warm-up or precision=fp32, in a run of another name, "
            "may help"
        )
    return kept.strip(", .")
