"""Training on the pyramid: which anchors and RoIs learn what, and the losses (Lin et al. 2017, secs. 4.1, 4.2, 5)."""
