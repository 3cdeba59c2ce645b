"""Atom pages: a static site with a page for every atom of an SAE; one page in a notebook; export to Neuronpedia."""

from writesae.pages.neuronpedia import export
from writesae.pages.show import Page
from writesae.pages.site import write_pages
from writesae.pages.study import Study

__all__ = ["Page", "Study", "export", "write_pages"]
