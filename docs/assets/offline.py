"""Build hook: pages ask no other host, so the theme's remote fallback for search workers is taken out."""

import re


def _local(html):
    return re.sub(r'<script[^>]*src="https?://[^"]*"[^>]*></script>', "", html)


def on_post_page(output, page, config):
    """Remove script tags with a remote source from a page."""
    return _local(output)


def on_post_template(output_content, template_name, config):
    """The same for pages without a source, such as 404.html."""
    return _local(output_content)
