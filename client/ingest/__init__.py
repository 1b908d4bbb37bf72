"""From an archive to a shard: readers, workers, journal, report."""
