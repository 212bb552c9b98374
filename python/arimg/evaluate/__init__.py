"""Measures of generated images: KID on EfficientNet-lite0 features, and PSNR of reconstructions."""

from arimg.evaluate.efficientnet import EfficientNetLite0, load_efficientnet
from arimg.evaluate.kid import Kid, features, kid, psnr, squared_mmd

__all__ = ["EfficientNetLite0", "Kid", "features", "kid", "load_efficientnet", "psnr", "squared_mmd"]
