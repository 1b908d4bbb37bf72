"""`fedmermed-site check`: is this site ready, and if not, what to do about it."""
