"""Segmentation proposals (Lin et al. 2017, sec. 6 and appendix A): what surrounds the weights of such a model."""
