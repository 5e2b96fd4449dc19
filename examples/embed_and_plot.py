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

MODEL, SET = sys.argv[1:] if len(sys.argv) == 3 else ["runs/first", "data/mine"]
if len(sys.argv) == 2:  # --help, or one place alone
    sys.exit("usage: python examples/embed_and_plot.py MODEL SET")
PAIRS = 256

# %% the model, and the first pairs of the set
model, _, _ = alignclip.load(MODEL)
chosen = alignclip.dataset(SET)[:PAIRS]

# %% features of unit length, [pairs, embed_dim]
with torch.inference_mode():
    images = model.encode_image([pair.image for pair in chosen], normalize=True)
    texts = model.encode_text([pair.caption for pair in chosen], normalize=True)

# %% the gap is the distance of the two means; alignment is the mean cosine of the pairs
gap = (images.mean(0) - texts.mean(0)).norm().item()
score = (images * texts).sum(1).mean().item()
print(f"modality gap {gap:.2f}, alignment {score:.2f}")

# %% the two first principal components of all features
both = torch.cat([images, texts])
_, _, axes = torch.pca_lowrank(both, q=2)
points = (both - both.mean(0)) @ axes
plt.scatter(*points[: len(images)].T, s=8, label="images")
plt.scatter(*points[len(images) :].T, s=8, label="texts")
plt.title(f"{MODEL}: gap {gap:.2f}, alignment {score:.2f}")
plt.legend()
plt.savefig("embeddings.png", dpi=150)
