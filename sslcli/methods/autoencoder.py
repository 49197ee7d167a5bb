"""Autoencoder: reconstruction of an image from a low-dimensional code; the input may be corrupted (denoising).

Hinton and Salakhutdinov 2006  https://doi.org/10.1126/science.1127647
Vincent et al. 2008 (denoising)  https://doi.org/10.1145/1390156.1390294   conf/method/autoencoder.yaml

Shapes: N images per process, C channels, S image side in pixels, D code size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.errors import check_positive
from sslcli.methods.base import Batch, Method
from sslcli.methods.code_input import check_code_from, code_input, code_input_width
from sslcli.nn.batch_norm import SyncBatchNorm, convert_batch_norm
from sslcli.nn.decoder import Decoder, FirstLook, psnr
from sslcli.nn.modes import full_precision
from sslcli.nn.noise import Noise

CORRUPTIONS = ("gaussian", "pixel_mask", "block_mask", "salt_pepper")
LOSSES = ("mse", "l1", "bce", "patch")
PICTURE_SEED = 0  # seed of the corruption in saved images; constant, so that the images of all epochs are comparable


def corrupt(images: Tensor, numbers: Tensor, *, kind: str, strength: float) -> Tensor:
    """Return a corrupted copy of images (N, C, S, S) in [0, 1].

    All kinds of corruption except block_mask are from Vincent et al. 2010.

    Args:
        images: (N, C, S, S) in [0, 1]; not modified.
        numbers: random numbers. For gaussian: (N, C, S, S), standard normal. For all other kinds: (N, 1, S, S), uniform
            in [0, 1), one number per pixel.
        kind: gaussian adds noise without clamping. pixel_mask and block_mask set pixels to black. salt_pepper sets each
            corrupted pixel to white or black with equal probability.
        strength: for gaussian, the standard deviation of the noise. For all other kinds, the expected fraction of
            corrupted pixels.
    """
    numbers = numbers.to(images.dtype)
    if kind == "gaussian":
        return images + strength * numbers
    damaged = numbers < strength
    if kind == "salt_pepper":
        return torch.where(damaged, (numbers < strength / 2).to(images.dtype), images)
    return images.masked_fill(damaged, 0.0)


def patch_statistics(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each patch of images (N, C, S, S), as two tensors (N, 1, S, S).

    Both are computed over all pixels and channels of a patch, and every pixel of the patch gets these two values. The
    standard deviation is sqrt(unbiased variance + 1e-6), as in the official code of MAE (arXiv:2111.06377).
    """
    patches = torch.unflatten(torch.unflatten(images, 3, (-1, patch_size)), 2, (-1, patch_size))  # (N, C, h, p, w, p)
    variance, mean = torch.var_mean(patches, dim=(1, 3, 5))  # (N, h, w)
    return tuple(  # type: ignore[return-value]
        value.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
        for value in (mean, (variance + 1e-6).sqrt())
    )


def reconstruction_loss(drawn: Tensor, images: Tensor, *, kind: str, patch_size: int = 4) -> Tensor:
    """Return the reconstruction error of the decoder output `drawn`, averaged over images, channels and pixels.

    `drawn` and `images` are (N, C, S, S). `kind` is one of LOSSES. For kind="bce", `drawn` contains logits and `images`
    is in [0, 1]. For kind="patch", this function standardizes each patch of `images`, and `drawn` is compared with the
    standardized patches. The error is computed in float32, or in float64 if the input is float64.
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
    """Reconstruction of images from the code of a backbone, without skip connections.

    Args:
        image_size: image side S in pixels.
        channels: image channels C.
        dim: code size D.
        code_from: input of the linear layer that computes the code. features: the output of the backbone, which for
            most backbones is a mean over positions. map: the last feature map of the backbone with all positions.
        width: channels of the decoder's first feature map, which has the smallest side.
        loss: mse, l1, bce or patch. With bce, the decoder outputs logits. With patch, the loss is the mse between the
            decoder output and the images, after each patch of the images is standardized.
        patch_size: side in pixels of the patches of loss=patch. It must be at least 2 and divide image_size.
        corruption: corruption of the input of the backbone in training: gaussian, pixel_mask, block_mask, salt_pepper,
            or None for no corruption.
        strength: for gaussian, the standard deviation of the noise, at least 0. For all other corruptions, the fraction
            of corrupted pixels, in [0, 1].
        block_size: side in pixels of the blocks of block_mask.

    Raises ValueError if an argument is out of range. The first step raises ConfigError if the images are not in [0, 1],
    for example because views.normalize is true.
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        *,
        image_size: int,
        channels: int = 3,
        dim: int = 128,
        code_from: Literal["features", "map"] = "features",
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
        check_code_from(code_from)
        check_positive(dim=dim, patch_size=patch_size)
        if loss == "patch" and (image_size % patch_size or patch_size < 2):
            raise ValueError(
                f"patch_size is {patch_size}, but it must be at least 2 and divide the {image_size} pixels of a side"
            )
        check_corruption(corruption, strength=strength, block_size=block_size)
        self.code_from = code_from
        width_in = code_input_width(backbone, code_from, image_size=image_size, channels=channels)
        self.to_code = nn.Linear(width_in, dim)
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
        """Return the input of the backbone: `images` (N, C, S, S) or a corrupted copy of it.

        No image is corrupted if the method has no corruption. Otherwise, all images are corrupted in training mode, and
        in evaluation mode only if `generator` is given. If `generator` is given, it draws the random numbers of the
        corruption. It must be on the CPU.
        """
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
        """Convert the decoder output `drawn` (N, C, S, S) to pixels that can be compared with `images` (N, C, S, S).

        With loss="patch", the pixels get the mean and the standard deviation of the patches of `images`.
        """
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
        """Return the code: (N, C, S, S) -> (N, D)."""
        return self.to_code(code_input(self.backbone, self.code_from, images))  # type: ignore[no-any-return]

    def pictures(self, images: Tensor) -> dict[str, list[Tensor]]:
        seen = self.corrupted(images, torch.Generator().manual_seed(PICTURE_SEED))
        drawn = self.pixels(self.decoder(self.projection(seen)), images)
        rows = [images, drawn] if self.corruption is None else [images, seen, drawn]
        return {"reconstruction": rows}


def check_corruption(kind: str | None, *, strength: float, block_size: int) -> None:
    """Raise ValueError if the corruption is unknown, or if its strength or block size is out of range."""
    check_positive(block_size=block_size)
    if kind is None:
        return
    if kind not in CORRUPTIONS:
        raise ValueError(f"corruption is {kind!r}, but it must be null or one of {', '.join(CORRUPTIONS)}")
    if not strength >= 0 or (kind != "gaussian" and strength > 1):
        allowed = "a standard deviation of at least 0" if kind == "gaussian" else "a fraction of the pixels in [0, 1]"
        raise ValueError(f"strength is {strength}, but for corruption={kind} it must be {allowed}")
