"""Mask-proposal models (Lin et al. 2017, sec. 6 and appendix A): the weights, their training and their export."""
