"""The documentation site: docs/*.md and a reference made from docstrings. `make docs` builds it."""

import ast
import inspect
import textwrap

from robust_jax import __version__

project = "robust_jax"
author = "the robust_jax authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
default_role = "code"  # single backticks in docstrings are code, as in Markdown
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute is also a member, and would be described twice
napoleon_custom_sections = ["Reference"]
autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"robust_jax {version}"
html_copy_source = False
html_show_copyright = False


def signature_as_written(app, what, name, obj, options, signature, returns):
    """The source's signature: it says Images where inspection says Float[Array, "b h w c"]."""
    ours = (getattr(obj, "__module__", None) or "").startswith("robust_jax")
    if not ours or what not in ("function", "method", "class"):
        return None
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    if isinstance(node, ast.FunctionDef):
        node.args.args = node.args.args[what == "method" :]  # without self
        return f"({ast.unparse(node.args)})", node.returns and ast.unparse(node.returns)
    fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    return (f"({', '.join(fields)})", None) if fields else None


def skip_fields(app, what, name, obj, skip, options):
    """A record's fields are in its signature; what Python says of them says nothing."""
    return skip or (inspect.getdoc(obj) or "").startswith("Alias for field number")


def setup(app):
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("autodoc-skip-member", skip_fields)
