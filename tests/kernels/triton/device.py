"""Where the kernels under test run: on the GPU if there is one, else on the CPU in Triton's interpreter."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
