"""Read still and animated pictures that Pillow opens."""
