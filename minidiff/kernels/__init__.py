"""Kernels in Triton for GPUs and one for CPUs, each beside the plain maths that it must equal. To be read in this order:

    tiles.py            what they share: tiles of a head that is no power of two wide, matrix products, what no kernel takes
    self_attention.py   latent cells (or words) look at each other: the online softmax, and its gradients
    cross_attention.py  latent cells look at the words: all keys at once, and their gradients in one pass
    group_norm_silu.py  GroupNorm and SiLU of the U-Net's ResBlocks, channels last
    geglu.py            the gate of the U-Net's feed-forward layers
    cpu_attention.py    attention in bfloat16 on a CPU, in tiles, on PyTorch's matrix products

None of them is needed: on machines without Triton or without an NVIDIA GPU everything runs on PyTorch's own operations.
"""
