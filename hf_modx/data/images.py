"""From any stored image to RGB, and random augmentation of a batch."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image | None) -> Image.Image:
    """Upright RGB from any mode: EXIF rotation applied, transparency laid on white, 16 bits scaled to 8, the first
    frame of an animation.

    Raises:
        ValueError: there is no image. Pillow raises nearly anything on a broken one.
    """
    if image is None:
        raise ValueError("it is null.")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = np.asarray(image, dtype=np.float32)
        # The mode does not say the range: the largest value tells which of the usual ones it is.
        bounds = (1.0, 255.0) if image.mode == "F" else (255.0,)
        largest = next((bound for bound in bounds if pixels.max(initial=0) <= bound), 65535.0)
        image = Image.fromarray((pixels.clip(0, largest) * (255.0 / largest)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def augment_affine_color(pixel_values: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
    """Random rotation (up to 15 degrees), scale (0.85 to 1.15), shift (up to 7.5 %), tint and brightness; one image
    in ten becomes grey.

    Args:
        pixel_values: (N, 3, H, W), normalised; the border is repeated where the image is moved away.
        generators: N random generators; image i depends on generator i alone.

    Returns:
        (N, 3, H, W) of the dtype given; computed in fp32.
    """
    draws = torch.from_numpy(np.stack([generator.uniform(-1.0, 1.0, size=9) for generator in generators])).float()
    angle = draws[:, 0] * math.radians(15)
    scale = 1.0 + 0.15 * draws[:, 1]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [torch.stack([cos, -sin, 0.15 * draws[:, 2]], dim=1), torch.stack([sin, cos, 0.15 * draws[:, 3]], dim=1)],
        dim=1,
    )
    grid = F.affine_grid(theta, list(pixel_values.shape), align_corners=False)
    images = F.grid_sample(pixel_values.float(), grid, padding_mode="border", align_corners=False)
    grey = (draws[:, 4] > 0.8).float()[:, None, None, None]
    images = grey * images.mean(dim=1, keepdim=True) + (1 - grey) * images
    tint = 1.0 + 0.2 * draws[:, 5:8, None, None]
    brightness = 0.2 * draws[:, 8, None, None, None]
    return (images * tint + brightness).to(pixel_values.dtype)
