"""Autoencoder: squeeze an image through a short code and draw it again; from a corrupted copy, denoising.

Hinton and Salakhutdinov 2006  https://doi.org/10.1126/science.1127647
Vincent et al. 2008 (denoising)  https://doi.org/10.1145/1390156.1390294   conf/method/autoencoder.yaml

Shapes: N images a process, C channels, S their side in pixels, D size of the code.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.decoder import Decoder, FirstLook, psnr
from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method, num_features
from sslcli.nn import SyncBatchNorm, convert_batch_norm, full_precision
from sslcli.noise import Noise

CORRUPTIONS = ("gaussian", "pixel_mask", "block_mask", "salt_pepper")
LOSSES = ("mse", "l1", "bce", "patch")
PICTURE_SEED = 0  # of the corruption in pictures, so that those of two epochs can be compared


def corrupt(images: Tensor, numbers: Tensor, *, kind: str, strength: float) -> Tensor:
    """A damaged copy of images (N, C, S, S) in [0, 1], with the damages of Vincent et al. 2010 and blocks.

    Args:
        images: left as they are.
        numbers: (N, C, S, S) standard normal for gaussian, else (N, 1, S, S) uniform in [0, 1), one a pixel.
        kind: gaussian adds noise and does not clamp; pixel_mask and block_mask blacken pixels; salt_pepper makes as
            many white as black.
        strength: the noise's standard deviation, or the expected share of damaged pixels.
    """
    numbers = numbers.to(images.dtype)
    if kind == "gaussian":
        return images + strength * numbers
    damaged = numbers < strength
    if kind == "salt_pepper":
        return torch.where(damaged, (numbers < strength / 2).to(images.dtype), images)
    return images.masked_fill(damaged, 0.0)


def patch_statistics(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch over its pixels and channels: (N, C, S, S) -> twice (N, 1, S, S).

    The variance is the unbiased one, plus 1e-6 (MAE, arXiv:2111.06377, as in the official code).
    """
    patches = torch.unflatten(torch.unflatten(images, 3, (-1, patch_size)), 2, (-1, patch_size))  # (N, C, h, p, w, p)
    variance, mean = torch.var_mean(patches, dim=(1, 3, 5))  # (N, h, w)
    return tuple(  # type: ignore[return-value]
        value.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
        for value in (mean, (variance + 1e-6).sqrt())
    )


def reconstruction_loss(drawn: Tensor, images: Tensor, *, kind: str, patch_size: int = 4) -> Tensor:
    """The mean over images, channels and pixels of the error of `drawn`, what the decoder gave for `images`.

    Both are (N, C, S, S). For bce `drawn` holds logits and `images` lie in [0, 1]; for patch `drawn` holds pixels
    standardised within their patch. Works in float32 or better.
    """
    drawn, images = full_precision(drawn), full_precision(images)
    if kind == "l1":
        return F.l1_loss(drawn, images)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(drawn, images)
    if kind == "patch":
        mean, deviation = patch_statistics(images, patch_size)
        images = (images - mean) / deviation
    return F.mse_loss(drawn, images)


class Autoencoder(Method):
    """Reconstruct images from the code of a backbone; nothing goes around the code.

    Args:
        image_size: side S of the images in pixels.
        channels: C of the images.
        dim: size D of the code.
        width: channels of the decoder's smallest map.
        loss: mse, l1, bce (the decoder gives logits), or patch: mse of pixels standardised within their patch.
        patch_size: side of those patches; divides image_size.
        corruption: of what the backbone sees in training, or None: gaussian, pixel_mask, block_mask, salt_pepper.
        strength: standard deviation of gaussian noise, at least 0; share of damaged pixels of the others, in [0, 1].
        block_size: side of the blocks of block_mask in pixels.

    Images lie in [0, 1] (views.normalize=false); the first step refuses others.
    Raises ValueError for values outside these.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 128,
        width: int = 512,
        loss: Literal["mse", "l1", "bce", "patch"] = "mse",
        patch_size: int = 4,
        corruption: Literal["gaussian", "pixel_mask", "block_mask", "salt_pepper"] | None = None,
        strength: float = 0.25,
        block_size: int = 4,
    ) -> None:
        super().__init__(backbone)
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, but it must be one of {', '.join(LOSSES)}")
        check_positive(dim=dim, patch_size=patch_size)
        if loss == "patch" and (image_size % patch_size or patch_size < 2):
            raise ValueError(
                f"patch_size is {patch_size}, but it must be at least 2 and divide the {image_size} pixels of a side"
            )
        check_corruption(corruption, strength=strength, block_size=block_size)
        self.to_code = nn.Linear(num_features(backbone), dim)
        self.decoder = Decoder(dim, image_size=image_size, channels=channels, width=width)
        convert_batch_norm(self, SyncBatchNorm)
        self.noise = Noise()
        self.first_look = FirstLook((channels, image_size, image_size))
        self.loss, self.patch_size = loss, patch_size
        self.corruption, self.strength, self.block_size = corruption, strength, block_size

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (images,) = batch.views
        self.first_look(images)
        code = self.projection(self.corrupted(images))  # (N, D)
        drawn = self.decoder(code)
        self.embeddings = (code.detach(),)
        return {
            "loss": reconstruction_loss(drawn, images, kind=self.loss, patch_size=self.patch_size),
            "psnr": psnr(self.pixels(drawn.detach(), images), images),
        }

    def corrupted(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the backbone sees of `images`: a damaged copy in training or where a generator (CPU) is given."""
        if self.corruption is None or not (self.training or generator):
            return images
        channels = images.shape[1] if self.corruption == "gaussian" else 1
        block = self.block_size if self.corruption == "block_mask" else 1
        side = -(-images.shape[-1] // block)
        shape = (len(images), channels, side, side)
        normal = self.corruption == "gaussian"
        if generator is not None:
            draw = torch.randn if normal else torch.rand
            numbers = draw(shape, generator=generator).to(images.device)
        else:
            numbers = (self.noise.normal if normal else self.noise.uniform)(*shape, device=images.device)
        numbers = numbers.repeat_interleave(block, 2).repeat_interleave(block, 3)
        numbers = numbers[..., : images.shape[-1], : images.shape[-1]]
        return corrupt(images, numbers, kind=self.corruption, strength=self.strength)

    def pixels(self, drawn: Tensor, images: Tensor) -> Tensor:
        """What the decoder gave as pixels on the scale of `images`; both (N, C, S, S)."""
        drawn, images = full_precision(drawn), full_precision(images)
        if self.loss == "bce":
            return drawn.sigmoid()
        if self.loss == "patch":
            mean, deviation = patch_statistics(images, self.patch_size)
            return drawn * deviation + mean
        return drawn

    def check_views(self, views: list[Tensor]) -> None:
        self.first_look(views[0])

    def projection(self, images: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, D), the code."""
        return self.to_code(self.backbone(images))  # type: ignore[no-any-return]

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        seen = self.corrupted(images, torch.Generator().manual_seed(PICTURE_SEED))
        drawn = self.pixels(self.decoder(self.projection(seen)), images)
        rows = [images, drawn] if self.corruption is None else [images, seen, drawn]
        return {"reconstruction": rows}


def check_corruption(kind: str | None, *, strength: float, block_size: int) -> None:
    """Raise ValueError unless there is such a corruption and its strength lies in its range."""
    check_positive(block_size=block_size)
    if kind is None:
        return
    if kind not in CORRUPTIONS:
        raise ValueError(f"corruption is {kind!r}, but it must be null or one of {', '.join(CORRUPTIONS)}")
    if not strength >= 0 or (kind != "gaussian" and strength > 1):
        allowed = "a standard deviation of at least 0" if kind == "gaussian" else "a share of pixels in [0, 1]"
        raise ValueError(f"strength is {strength}, but for corruption={kind} it must be {allowed}")
