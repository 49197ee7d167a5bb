"""Losses of CPC and CPC v2: the encoding of a patch among sampled ones, or among those of all patches.

Shapes: N images per process, W processes, g x g patches per image, R rows of contexts, E context size, M negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.distributed.collectives import all_gather_with_grad, rank
from sslcli.nn.contrastive import Contrast, info_nce


def sampled_contrast(context: Tensor, targets: Tensor, negative: Tensor) -> Contrast:
    """Return the cross-entropy of the target of each context among sampled targets (CPC v1, eq. 4).

    Args:
        context: (N, R, g, E), the contexts of size E, for N images, R rows and g columns of the grid of patches.
        targets: (N, R, g, E). The target of a context is W_k z: z is the encoding of the patch to predict, and W_k is
            the linear layer for the offset k between context and patch.
        negative: (N, R, g, M) int64, indices of the M negatives of each context. The indices refer to the targets of
            all W processes, flattened to (W N R g, E). The sampled indices may include the target of the context
            itself, as in public implementations. The loss therefore does not reach 0.

    The cross-entropy is averaged over contexts. It is computed in float32 (or float64 if the input is float64), even
    under autocast. The log-softmax is exact. Public implementations use log(softmax + 1e-11). The gradient of this
    expression vanishes if the probability of the target is very small.
    """
    with torch.autocast(context.device.type, enabled=False):
        dtype = torch.promote_types(context.dtype, torch.float32)
        context, targets = context.to(dtype), targets.to(dtype)
        pool = all_gather_with_grad(targets.contiguous()).flatten(0, 2)
        own = (context * targets).sum(3, keepdim=True)  # (N, R, g, 1)
        # The backward pass of index_select is twice as fast as the backward pass of pool[negative].
        drawn = pool.index_select(0, negative.flatten()).view(*negative.shape, -1)
        others = torch.einsum("nrge,nrgme->nrgm", context, drawn)
        loss = -F.log_softmax(torch.cat([own, others], 3), dim=3)[..., 0].mean()
        mine = own_places(*negative.shape[:3], offset=0, device=negative.device).view(negative.shape[:3])
        rivals = others.detach().masked_fill(negative == mine[..., None], -torch.inf)
        accuracy = (own > rivals.amax(3, keepdim=True)).to(dtype).mean()
    return Contrast(loss, accuracy)


def full_contrast(prediction: Tensor, targets: Tensor, *, offset: int) -> Contrast:
    """Return the cross-entropy of the target of each prediction among all patches of all images (CPC v2, appendix).

    Each of N images has a grid of g x g patches. A prediction is computed from the context of one patch. Its target is
    the patch `offset` rows below. Only the first R = g - offset rows of the grid have such a target.

    Args:
        prediction: (N, R, g, dim), the predictions.
        targets: (N, g, g, dim), the projected encodings of all patches.
        offset: number of rows from the context to the target.

    The cross-entropy is averaged over predictions. It is computed in float32 (or float64 if the input is float64), even
    under autocast.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        pool = all_gather_with_grad(targets.to(dtype).contiguous()).flatten(0, 2)  # (W N g g, E)
        own = own_places(*prediction.shape[:3], offset=offset, device=prediction.device)
        query = prediction.to(dtype).flatten(0, 2)
        return info_nce(query, pool[own], pool, temperature=1.0, exclude=own[:, None])


def own_places(num_images: int, rows: int, columns: int, *, offset: int, device: torch.device) -> Tensor:
    """Return the index of the target of each context, (N R g,) int64, for N images, R rows and g columns of contexts.

    The target is the patch `offset` rows below the context. Each image has a grid of R + offset rows and g columns of
    patches. The grids of the images of all processes are flattened to one dimension, to which the indices refer.
    """
    image = rank() * num_images + torch.arange(num_images, device=device)[:, None, None]
    row = torch.arange(rows, device=device)[:, None] + offset
    return ((image * (rows + offset) + row) * columns + torch.arange(columns, device=device)).flatten()
