"""Draw pictures with known captions: ``scene`` decides what a picture shows, ``render`` draws it."""
