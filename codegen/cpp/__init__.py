"""C++ kernels: what a request becomes as text.  kvcompile/link.py has it built and loaded."""
