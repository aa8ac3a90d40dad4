"""Documents of unequal length packed into one sequence: none sees another, and the block mask is made once."""
from __future__ import annotations

import torch

import flexref
from flexref.variants import masks


def main() -> None:
    """Packs three documents and shows that the second one's rows are as if it were alone."""
    lengths = [500, 1200, 348]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask_mod = flexref.and_masks(masks.document(ids), masks.causal)
    block_mask = flexref.create_block_mask(mask_mod, None, None, len(ids), len(ids), device="cpu")
    print(block_mask)

    query, key, value = (torch.randn(1, 4, len(ids), 64) for _ in range(3))
    packed = flexref.flex_attention(query, key, value, block_mask=block_mask)
    second = slice(500, 1700)
    query, key, value = query[:, :, second], key[:, :, second], value[:, :, second]
    alone = flexref.flex_attention(query, key, value, mask_mod=masks.causal)
    print("largest difference:", float((packed[:, :, second] - alone).abs().max()))


if __name__ == "__main__":
    main()
