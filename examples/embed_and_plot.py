# %% [markdown]
# Load a model, embed the pairs of a set, and look at the modality gap.
#
# Editors show this file as a notebook. As a script: python examples/embed_and_plot.py MODEL SET
"""Load a model, embed the pairs of a set, and draw where images and texts lie."""

# %%
import sys

import matplotlib.pyplot as plt
import torch

import alignclip

PLACES = sys.argv[1:3] if len(sys.argv) >= 3 else ["runs/first", "data/mine"]
MODEL, SET = PLACES
PAIRS = 256

# %% the model, and the first pairs of the set
model, preprocess, _ = alignclip.load(MODEL)
pairs = alignclip.dataset(SET)
chosen = [pairs[index] for index in range(min(PAIRS, len(pairs)))]
captions = [pair.caption if isinstance(pair.caption, str) else pair.caption[0] for pair in chosen]

# %% features of unit length, [pairs, embed_dim]
with torch.inference_mode():
    images = model.encode_image(
        torch.stack([preprocess(pair.image) for pair in chosen]), normalize=True
    )
    texts = model.encode_text(captions, normalize=True)

# %% the gap is the distance of the two means; alignment is the mean cosine of the pairs
gap = (images.mean(0) - texts.mean(0)).norm().item()
alignment = (images * texts).sum(1).mean().item()
print(f"modality gap {gap:.2f}, alignment {alignment:.2f}")

# %% the two first principal components of all features
both = torch.cat([images, texts])
_, _, axes = torch.pca_lowrank(both, q=2)
points = (both - both.mean(0)) @ axes
plt.scatter(*points[: len(images)].T, s=8, label="images")
plt.scatter(*points[len(images) :].T, s=8, label="texts")
plt.title(f"{MODEL}: gap {gap:.2f}, alignment {alignment:.2f}")
plt.legend()
plt.savefig("embeddings.png", dpi=150)
