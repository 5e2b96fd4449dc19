"""Pretrain CLIP models with a small modality gap, streamed from object storage.

The method is AlignCLIP's: "Mitigate the Gap: Improving Cross-Modal Alignment in CLIP", ICLR 2025,
https://arxiv.org/abs/2406.17639.
"""

__version__ = "0.1.0"
