"""An extension of griffe, which reads the docstrings for `make docs`: names as a package lists them."""

import griffe


class NamesOfPackages(griffe.Extension):
    """Lets `kaun.layers.linear` be the function that the package lists, as it is in Python, and not its module."""

    def on_package(self, *, pkg, **kwargs):
        packages = [pkg, *(module for module in modules_in(pkg) if module.is_init_module)]
        hidden = {
            f"{package.path}.{name}": package.members[name]
            for package in packages
            for name, target in package.imports.items()
            if target == f"{package.path}.{name}.{name}" and package.members[name].is_module
        }
        for module in [pkg, *modules_in(pkg)]:
            for name, member in list(module.members.items()):
                if not member.is_alias:
                    continue
                home, _, own = member.target_path.rpartition(".")
                home = member.target_path if member.target_path in hidden else home
                if home in hidden and own in hidden[home].members:
                    module.members[name] = griffe.Alias(name, hidden[home].members[own], parent=module)
        for path, module in hidden.items():
            name = path.rpartition(".")[2]
            module.parent.members[name] = griffe.Alias(name, module.members[name], parent=module.parent)


def modules_in(module):
    for member in list(module.members.values()):
        if not member.is_alias and member.is_module:
            yield member
            yield from modules_in(member)
