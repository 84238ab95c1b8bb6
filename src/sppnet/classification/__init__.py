"""Classes of images: networks with a pyramid, their training, and what they say of an image of any size."""
