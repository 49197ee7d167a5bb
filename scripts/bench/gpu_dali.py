"""Views of DALI for the GPU benchmark: JPEGs are decoded on the GPU, and only inside the crop of each view."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gpu_timing import Plan
from torch import Tensor


def dali_batches(root: Path, size: int, batch: int, threads: int, plan: Plan) -> Iterator[list[Tensor]]:
    """Yield two views of SimCLR per image, each (batch, 3, size, size), without grayscale: crop, flip, jitter and blur.

    `root` has one folder of JPEGs per class. Every view decodes its own crop (`decoders.image_slice`).
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    decoder = "mixed" if plan.on_gpu else "cpu"  # mixed: from the host to the GPU

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=0 if plan.on_gpu else None, seed=0)
    def pipeline():  # type: ignore[no-untyped-def]
        files, _ = fn.readers.file(file_root=str(root), random_shuffle=True, name="files")
        shapes = fn.peek_image_shape(files)
        views = []
        for _ in range(2):
            start, shape = fn.random_crop_generator(shapes, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
            view = fn.decoders.image_slice(files, start, shape, axes=[0, 1], device=decoder)
            view = fn.resize(view, size=[size, size], antialias=True)
            jitter = {name: fn.random.uniform(range=[0.6, 1.4]) for name in ("brightness", "contrast", "saturation")}
            view = fn.color_twist(view, hue=fn.random.uniform(range=[-36.0, 36.0]), **jitter)
            view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=[0.1, 2.0]))
            flipped = fn.random.coin_flip(probability=0.5)
            views.append(
                fn.crop_mirror_normalize(view, mirror=flipped, dtype=types.FLOAT, std=[255.0] * 3, output_layout="CHW")
            )
        return tuple(views)

    iterator = DALIGenericIterator([pipeline()], ["one", "two"], reader_name=None, size=-1)
    for (views,) in iterator:
        yield [views["one"].to(plan.device), views["two"].to(plan.device)]
