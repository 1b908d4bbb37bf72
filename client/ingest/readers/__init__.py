"""One reader a kind of file; each gives pictures of a file or a reason why not."""
