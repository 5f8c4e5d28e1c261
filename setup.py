"Hands the metadata of settings.ini to setuptools."

from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages
from setuptools.command.build_py import build_py


class BuildWithResults(build_py):
    "The recorded results, which a checkout keeps in nbs/results, travel as faces2voices/results."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "faces2voices" / "results"
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path("nbs/results").glob("*.json")):
            self.copy_file(str(file), str(target))


cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
meta = cfg["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): meta[key].split()
    for key in meta
    if key.endswith("_requirements")
}
extras["dev"] = sorted(
    {r for name in ("dev", "talkers", "metrics", "cluster") for r in extras[name]}
)

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    keywords=meta["keywords"],
    long_description=Path("README.md").read_text(encoding="utf-8")
    if Path("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    author=meta["author"],
    author_email=meta["author_email"],
    url=meta["git_url"],
    license="Apache-2.0",
    python_requires=f">={meta['min_python']}",
    packages=find_packages(include=["faces2voices", "faces2voices.*"]),
    package_data={"faces2voices": ["weights/*/*"]},
    include_package_data=True,
    cmdclass={"build_py": BuildWithResults},
    install_requires=meta["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": meta["console_scripts"].split(),
        "nbdev": [f"{meta['lib_name']}={meta['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Framework :: Jupyter",
    ],
    zip_safe=False,
)
