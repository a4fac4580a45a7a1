//! What the README shows is true.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use postern_hwtests::netns::{janitor, scratch_dir, unique_prefix};
use postern_hwtests::node::binary;
use postern_hwtests::process::run;

/// OPS-2: the configurations in the README are read without an error or a warning.
#[test]
fn ops_2_configurations_in_the_readme() -> Result<()> {
    janitor();
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))?;
    let dir = scratch_dir(&unique_prefix())?;
    let blocks: Vec<&str> =
        readme.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    ensure!(blocks.len() == 5, "{} blocks of TOML", blocks.len());
    for block in blocks {
        let file = dir.join("postern.toml");
        std::fs::write(&file, block)?;
        run(Command::new("chmod").arg("600").arg(&file))?;
        let checked = run(Command::new(binary("postern-control")?).arg("--check").arg("--config").arg(&file));
        let said = checked.with_context(|| block.to_owned())?;
        ensure!(said.trim_end().ends_with("no error, 0 warnings"), "{said}\n{block}");
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
