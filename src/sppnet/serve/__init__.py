"""`sppnet serve`: a page on which a person makes a detector, and an API for everyone else.

`sppnet.serve.app.make_app` makes the application of an opened `sppnet.serve.studio.Studio`; the way of a box
from the page to the disk and of a photo to its maps is in docs/serve.md, what it defends against in
docs/security.md.
"""
