"""Reports of evaluations: a folder with one page and its pictures, which asks for nothing outside itself."""
