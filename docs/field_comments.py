"""griffe extension: the comments on the fields of a dataclass become its "Attributes" section.

The command line reads the same comments for --help (tyro), so a setting is explained in one place.
"""

import ast
import io
import tokenize

import griffe


def field_comment(lines: list[str], field: griffe.Attribute) -> str:
    """Returns the comment at the end of a field's lines, else the comment lines above it."""
    own = "\n".join(lines[field.lineno - 1 : field.endlineno])
    for token in tokenize.generate_tokens(io.StringIO(own + "\n").readline):
        if token.type == tokenize.COMMENT and "noqa" not in token.string:
            return token.string.lstrip("# ")
    above = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    return " ".join(above)


class FieldComments(griffe.Extension):
    def on_class_members(self, *, node: ast.AST | griffe.ObjectNode, cls: griffe.Class, **_) -> None:
        lines = cls.filepath.read_text(encoding="utf-8").splitlines()
        fields = [
            member
            for member in cls.members.values()
            if member.is_attribute and "instance-attribute" in member.labels and not member.is_private
        ]
        comments = {field.name: field_comment(lines, field) for field in fields if not field.docstring}
        # Brackets, as in hf:NAME[#field], are not links.
        rows = [f"    {name}: {text.replace('[', '&#91;')}" for name, text in comments.items() if text]
        if not rows or (cls.docstring and "Attributes:" in cls.docstring.value):
            return
        section = "Attributes:\n" + "\n".join(rows)
        if cls.docstring is None:
            cls.docstring = griffe.Docstring(section, parent=cls)
        else:
            cls.docstring.value = f"{cls.docstring.value.rstrip()}\n\n{section}"
