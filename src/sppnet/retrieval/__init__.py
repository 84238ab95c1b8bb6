"""Images and regions as vectors, in files and in an index that is searched."""
