"""Reports of evaluations: a folder with one page and its images, which asks for nothing outside itself."""
