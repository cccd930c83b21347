//! The recipes that come with the program: configuration files of well-known pieces of work, with what others reached.

use super::resolve::nearest;
use crate::usage::UsageError;

/// A configuration file under a name.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    pub name: &'static str,
    /// TOML, as `--config` takes it.
    pub text: &'static str,
}

macro_rules! recipes {
    ($($name:literal),* $(,)?) => {
        &[$(Recipe { name: $name, text: include_str!(concat!("../recipes/", $name, ".toml")) }),*]
    };
}

/// All of them.
pub const ALL: &[Recipe] =
    recipes!["zaremba-small", "zaremba-medium", "word-lm-tied", "jsb-chorales", "adding-100", "char-shakespeare", "japanese-vowels",];

impl Recipe {
    /// What it is, from its first line.
    pub fn about(&self) -> &'static str {
        self.text.lines().next().unwrap_or_default().trim_start_matches('#').trim()
    }

    /// How to start it, from the comment at its head.
    pub fn command(&self) -> &'static str {
        let lines = self.text.lines().take_while(|line| line.starts_with('#'));
        let command = lines.map(|line| line.trim_start_matches('#').trim()).find(|line| line.starts_with("carrousel "));
        command.map_or("", |line| line.split("  #").next().unwrap_or(line).trim())
    }
}

/// The recipe of this name.
///
/// # Errors
/// There is none: the nearest name.
pub fn find(name: &str) -> Result<Recipe, UsageError> {
    let names: Vec<&str> = ALL.iter().map(|recipe| recipe.name).collect();
    ALL.iter().find(|recipe| recipe.name == name).copied().ok_or_else(|| {
        let nearest = nearest(name, &names).map(|name| format!("; the nearest is {name}")).unwrap_or_default();
        UsageError(format!("there is no recipe '{name}'{nearest} (of {})", names.join(", ")))
    })
}
