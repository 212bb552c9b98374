"""Images from folders and tars, splits by name, and the emoji drawings that the bundled model learnt from."""

from arimg.data.images import Images, augment, load_images, open_image, to_tensor

__all__ = ["Images", "augment", "load_images", "open_image", "to_tensor"]
