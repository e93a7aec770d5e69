"""The gallery: captioned images on disk, built from streams of shards, searched by caption."""
