"""What is observed of a layer while calibration tokens run through it. One file a kind of statistic."""
