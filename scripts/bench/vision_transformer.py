"""Benchmark of one training step of the methods with vision transformers: ViT-Tiny, 4 x 4 pixels per patch, 32 px.

The plain loops have the structure of the official code (facebookresearch/mae, microsoft/SimMIM, facebookresearch/ijepa,
facebookresearch/dino, bytedance/ibot, facebookresearch/dinov2), with the transformer of timm. They get masks that were
drawn before the measurement; sslcli draws its masks in the step. `best` adds bfloat16 if the processor supports it
natively, attention as two matrix products, which is then faster, and an allocator that keeps freed memory.
`dino/view by view` is sslcli with one call of the backbone per view.

With ONE_CORE=1, the CPU time of one thread is measured, which is also valid if the machine has other load.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from measure import Result, run_benchmark, timed
from torch import Tensor, nn
from workload import CPU

BATCH, SIZE, SMALL, PATCH, WIDTH = 32, 32, 16, 4, 192
GRID = SIZE // PATCH
NUM_VIEWS = {"mae": 1, "simmim": 1, "ijepa": 1, "dino": 6, "ibot": 6, "dinov2": 6}
PROTOTYPES = 1024
CONTEXT = 14  # patches of the context of I-JEPA
CLOCK = time.process_time if "ONE_CORE" in os.environ else time.perf_counter
Step = Callable[[list[Tensor]], Tensor]


def random_views(count: int) -> list[Tensor]:
    """Return random views of BATCH images: two of SIZE pixels, the others of SMALL pixels."""
    return [torch.rand(BATCH, 3, *(2 * [SIZE if view < 2 else SMALL])) for view in range(count)]


def sslcli_step(method: str, *, grouped: bool = True) -> Result:
    """Time a step of sslcli: forward, backward, optimizer and teacher."""
    from sslcli.backbones.vit import VisionTransformer
    from sslcli.engine import precision
    from sslcli.methods import dino
    from sslcli.methods.base import Batch
    from sslcli.methods.dinov2 import DINOv2
    from sslcli.methods.ibot import IBOT
    from sslcli.methods.ijepa import IJEPA
    from sslcli.methods.mae import MAE
    from sslcli.methods.simmim import SimMIM
    from sslcli.system.memory import keep_freed_memory

    keep_freed_memory()
    pool = "mean" if method in ("ijepa", "simmim") else "cls"
    net = VisionTransformer(image_size=SIZE, patch_size=PATCH, width=WIDTH, depth=12, num_heads=3, pool=pool)
    heads = {"num_prototypes": PROTOTYPES, "hidden": 512, "num_views": NUM_VIEWS[method]}
    built = {
        "mae": lambda: MAE(net, image_size=SIZE, decoder_dim=128, decoder_depth=2, decoder_heads=4),
        "simmim": lambda: SimMIM(net, image_size=SIZE),
        "ijepa": lambda: IJEPA(net, image_size=SIZE, predictor_dim=96, predictor_depth=4, predictor_heads=3),
        "dino": lambda: dino.DINO(net, **heads),
        "ibot": lambda: IBOT(net, image_size=SIZE, **heads),
        "dinov2": lambda: DINOv2(net, image_size=SIZE, **heads),
    }[method]()
    if not grouped:
        dino.forward_by_size = lambda backbone, views: torch.cat([backbone(view) for view in views])
    optimizer = torch.optim.AdamW(built.train().parameters(), lr=1e-4)
    batch = Batch(random_views(NUM_VIEWS[method]), torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.long))
    resolved = precision.resolve("auto", CPU)

    def step() -> None:
        built.before_step(0.5, 1.0)
        with precision.autocast(CPU, resolved):
            loss = built(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        built.after_step(0.5)

    return timed(step, images=BATCH, warmup=1, clock=CLOCK)


def plain_step(method: str, *, best: bool) -> Result:
    """Time a step of a loop with the structure of the official code."""
    from sslcli.engine import precision

    timm.layers.set_fused_attn(not best)
    student, teacher, loss_of = PLAIN[method]()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    dtype, views = precision.resolve("auto", CPU) if best else "fp32", random_views(NUM_VIEWS[method])

    def step() -> None:
        with precision.autocast(CPU, dtype):
            loss = loss_of(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for average, current in zip(teacher.parameters(), student.parameters(), strict=False):
                average.data.mul_(0.996).add_(0.004 * current.detach().data)

    return timed(step, images=BATCH, warmup=1, clock=CLOCK)


def timm_vit() -> nn.Module:
    """Return timm's ViT-Tiny without classifier."""
    return timm.create_model(  # type: ignore[no-any-return]
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, num_classes=0, dynamic_img_size=True
    )


def embedded(net: nn.Module, images: Tensor, mask: Tensor | None = None, token: Tensor | None = None) -> Tensor:
    """Return class token and patches with positions (N, 1 + P, D). Patches where `mask` (N, P) is 1 become `token`."""
    x = net.patch_embed(images)
    if mask is not None and token is not None:
        grid = x.shape
        weight = mask.view(len(images), -1, 1).to(x.dtype)
        x = (x.flatten(1, 2) * (1 - weight) + token.expand(len(images), weight.shape[1], -1) * weight).view(grid)
    return net._pos_embed(x)  # type: ignore[no-any-return]


def taken(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of x (N, P, D) at the places `index` (N, K)."""
    return x.gather(1, index[:, :, None].repeat(1, 1, x.shape[2]))


def transformer(width: int, depth: int, heads: int) -> nn.Sequential:
    """Return blocks of timm."""
    return nn.Sequential(*(timm.models.vision_transformer.Block(width, heads, qkv_bias=True) for _ in range(depth)))


def plain_mae() -> tuple[nn.Module, nn.Module, Step]:
    """Return the networks and the loss of MAE: encoder of the visible patches, decoder of all."""
    num, dim = GRID * GRID, 128
    net, embed, blocks, predict = (
        timm_vit(),
        nn.Linear(WIDTH, dim),
        transformer(dim, 2, 4),
        nn.Linear(dim, 3 * PATCH**2),
    )
    token, positions = nn.Parameter(torch.zeros(1, 1, dim)), torch.rand(1, 1 + num, dim)
    student = nn.ModuleList([net, embed, blocks, predict, nn.ParameterList([token])])

    def loss(views: list[Tensor]) -> Tensor:
        x = embedded(net, views[0])
        noise = torch.rand(BATCH, num)
        order = noise.argsort(1)
        restore = order.argsort(1)
        mask = torch.ones(BATCH, num)
        mask[:, : num // 4] = 0
        mask = mask.gather(1, restore)
        x = net.norm(net.blocks(torch.cat([x[:, :1], taken(x[:, 1:], order[:, : num // 4])], 1)))
        x = embed(x)
        all_tokens = torch.cat([x[:, 1:], token.to(x.dtype).repeat(BATCH, num - num // 4, 1)], 1)
        x = torch.cat([x[:, :1], taken(all_tokens, restore)], 1) + positions
        prediction = predict(blocks(x))[:, 1:]
        target = F.unfold(views[0], PATCH, stride=PATCH).mT
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return (((prediction - target) ** 2).mean(-1) * mask).sum() / mask.sum()

    return student, nn.Module(), loss


def plain_simmim() -> tuple[nn.Module, nn.Module, Step]:
    """Return the networks and the loss of SimMIM: all patches are encoded, one layer predicts the pixels."""
    net, decoder = timm_vit(), nn.Sequential(nn.Conv2d(WIDTH, 3 * PATCH**2, 1), nn.PixelShuffle(PATCH))
    token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    mask = (torch.rand(BATCH, GRID // 2, GRID // 2) < 0.6).float().repeat_interleave(2, 1).repeat_interleave(2, 2)

    def loss(views: list[Tensor]) -> Tensor:
        x = net.norm(net.blocks(embedded(net, views[0], mask, token)))[:, 1:]
        prediction = decoder(x.transpose(1, 2).reshape(BATCH, WIDTH, GRID, GRID))
        hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
        error = F.l1_loss(views[0], prediction.float(), reduction="none")
        return (error * hidden).sum() / (hidden.sum() + 1e-5) / 3

    return nn.ModuleList([net, decoder, nn.ParameterList([token])]), nn.Module(), loss


def plain_ijepa() -> tuple[nn.Module, nn.Module, Step]:
    """Return the networks and the loss of I-JEPA: one predictor sequence per target block."""
    net, dim = timm_vit(), 96
    teacher = copy.deepcopy(net)
    embed, blocks, predict = nn.Linear(WIDTH, dim), transformer(dim, 4, 3), nn.Linear(dim, WIDTH)
    token, positions = nn.Parameter(torch.zeros(1, 1, dim)), torch.rand(1, GRID * GRID, dim)
    # The mean sizes of the official masks for 8 x 8 patches and 32 images.
    context = torch.rand(BATCH, GRID * GRID).argsort(1)[:, :CONTEXT]
    targets = [torch.rand(BATCH, GRID * GRID).argsort(1)[:, :10] for _ in range(4)]

    def loss(views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            h = teacher.norm(teacher.blocks(embedded(teacher, views[0])))[:, 1:]
            h = F.layer_norm(h, (WIDTH,))
            h = torch.cat([taken(h, places) for places in targets])
        z = net.norm(net.blocks(taken(embedded(net, views[0])[:, 1:], context)))
        x = embed(z) + taken(positions.repeat(BATCH, 1, 1), context)
        queries = torch.cat([taken(positions.repeat(BATCH, 1, 1), places) for places in targets]) + token
        x = blocks(torch.cat([x.repeat(4, 1, 1), queries.to(x.dtype)], 1))[:, CONTEXT:]
        return F.smooth_l1_loss(predict(x).float(), h.float())

    return nn.ModuleList([net, embed, blocks, predict, nn.ParameterList([token])]), teacher, loss


class Head(nn.Module):
    """Head of DINO: three layers, normalization, prototypes."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 256)]
        self.mlp = nn.Sequential(*layers)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(256, PROTOTYPES, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.mlp(x), dim=-1))  # type: ignore[no-any-return]


def self_distillation() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Return backbone and head of the student, and of the teacher."""
    net, head = timm_vit(), Head()
    teacher_net, teacher_head = copy.deepcopy(net), Head()
    teacher_head.load_state_dict(head.state_dict())
    for network in (teacher_net, teacher_head):
        network.requires_grad_(False)
    return net, head, teacher_net, teacher_head


def class_loss(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """Return the cross-entropy of all pairs of a teacher view and another view. Both have the rows of all views."""
    logits = (student.float() / 0.1).chunk(NUM_VIEWS["dino"])
    targets = F.softmax((teacher.float() - center) / 0.04, -1).chunk(2)
    pairs = [(q, p) for i, q in enumerate(targets) for j, p in enumerate(logits) if i != j]
    losses = [torch.sum(-q * F.log_softmax(p, -1), -1).mean() for q, p in pairs]
    center.mul_(0.9).add_(teacher.float().mean(0), alpha=0.1)
    return torch.stack(losses).mean()


def plain_dino() -> tuple[nn.Module, nn.Module, Step]:
    """Return the networks and the loss of DINO; views of one size are concatenated, as in its MultiCropWrapper."""
    net, head, teacher_net, teacher_head = self_distillation()
    center = torch.zeros(1, PROTOTYPES)

    def loss(views: list[Tensor]) -> Tensor:
        teacher = teacher_head(teacher_net(torch.cat(views[:2])))
        student = head(torch.cat([net(torch.cat(views[:2])), net(torch.cat(views[2:]))]))
        return class_loss(student, teacher, center)

    return nn.ModuleList([net, head]), nn.ModuleList([teacher_net, teacher_head]), loss


def plain_ibot() -> tuple[nn.Module, nn.Module, Step]:
    """Return the networks and the loss of iBOT: DINO, and the cross-entropy of masked patches of the global views."""
    net, head, teacher_net, teacher_head = self_distillation()
    token, center, patch_center = nn.Parameter(torch.zeros(1, 1, WIDTH)), torch.zeros(1, PROTOTYPES), torch.zeros(1)
    mask = (torch.rand(2 * BATCH, GRID * GRID) < 0.15).float()

    def encoded(network: nn.Module, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        return network.norm(network.blocks(embedded(network, images, hidden, token)))  # type: ignore[no-any-return]

    def loss(views: list[Tensor]) -> Tensor:
        teacher = teacher_head(encoded(teacher_net, torch.cat(views[:2])))
        student = head(encoded(net, torch.cat(views[:2]), mask))
        local = head(net(torch.cat(views[2:])))
        classes = class_loss(torch.cat([student[:, 0], local]), teacher[:, 0], center)
        target = F.softmax((teacher[:, 1:].float() - patch_center) / 0.04, -1)
        each = torch.sum(-target * F.log_softmax(student[:, 1:].float() / 0.1, -1), -1)
        patches = ((each * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        return classes + patches

    student = nn.ModuleList([net, head, nn.ParameterList([token])])
    return student, nn.ModuleList([teacher_net, teacher_head]), loss


def assigned(logits: Tensor) -> Tensor:
    """Return the Sinkhorn-Knopp assignments of logits (n, K), with three iterations."""
    q = torch.exp(logits.float() / 0.07).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def plain_dinov2() -> tuple[nn.Module, nn.Module, Step]:
    """Return the networks and the loss of DINOv2: iBOT with Sinkhorn-Knopp and KoLeo; the heads get masked patches."""
    net, head, teacher_net, teacher_head = self_distillation()
    token = nn.Parameter(torch.zeros(1, 1, WIDTH))
    mask = torch.zeros(2 * BATCH, GRID * GRID)
    mask[::2] = (torch.rand(BATCH, GRID * GRID) < 0.3).float()
    masked = mask.flatten().nonzero().flatten()
    weight = (mask / mask.sum(1, keepdim=True).clamp(min=1)).flatten()[masked]

    def encoded(network: nn.Module, images: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = network.norm(network.blocks(embedded(network, images, hidden, token)))
        return x[:, 0], x[:, 1:].flatten(0, 1)[masked]

    def koleo(tokens: Tensor) -> Tensor:
        tokens = F.normalize(tokens.float(), dim=-1)
        similarity = tokens @ tokens.T
        similarity.detach().fill_diagonal_(-1)
        return -torch.log(F.pairwise_distance(tokens, tokens[similarity.argmax(1)]) + 1e-8).mean()

    def loss(views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            whole, patches = encoded(teacher_net, torch.cat(views[:2]))
            targets = assigned(teacher_head(whole)).chunk(2)
            patch_target = assigned(teacher_head(patches))
        tokens, patches = encoded(net, torch.cat(views[:2]), mask)
        class_tokens = torch.cat([tokens, net(torch.cat(views[2:]))])
        logits = head(torch.cat([class_tokens, patches])).float() / 0.1
        parts = logits[: len(class_tokens)].log_softmax(-1).chunk(len(views))
        pairs = [-(q * p).sum(-1).mean() for i, q in enumerate(targets) for j, p in enumerate(parts) if i != j]
        each = -(patch_target * logits[len(class_tokens) :].log_softmax(-1)).sum(-1)
        spread = sum(koleo(view) for view in tokens.chunk(2))
        return torch.stack(pairs).mean() + (each * weight).sum() / len(mask) + 0.1 * spread

    student = nn.ModuleList([net, head, nn.ParameterList([token])])
    return student, nn.ModuleList([teacher_net, teacher_head]), loss


PLAIN = {
    "mae": plain_mae,
    "simmim": plain_simmim,
    "ijepa": plain_ijepa,
    "dino": plain_dino,
    "ibot": plain_ibot,
    "dinov2": plain_dinov2,
}

if __name__ == "__main__":
    if "ONE_CORE" in os.environ:
        torch.set_num_threads(1)
    variants: dict[str, Callable[[str], Result]] = {
        "sslcli": sslcli_step,
        "plain loop": partial(plain_step, best=False),
        "plain loop best": partial(plain_step, best=True),
    }
    benchmarks = {f"{method}/{name}": partial(step, method) for name, step in variants.items() for method in NUM_VIEWS}
    run_benchmark(benchmarks | {"dino/view by view": partial(sslcli_step, "dino", grouped=False)})
