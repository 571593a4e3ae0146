"""Triton kernels of the ops, loaded when the first CUDA tensor meets one; ``fpn_kernels`` has what people call.

Each module holds its kernels, the function that launches them and, in ``BUILDS``, how ``fpn_kernels.aot`` compiles them
without a GPU. Launchers trust their arguments: the public functions have checked them.
"""
