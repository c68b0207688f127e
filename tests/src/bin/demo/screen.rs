//! How the demo looks: steps, commands, observations, verdicts. Colour on a terminal only.

use std::io::IsTerminal;

const BOLD: &str = "1";
const DIM: &str = "2";
const GREEN: &str = "32";
const RED: &str = "31";

/// Prints, and counts what went wrong.
pub(crate) struct Screen {
    in_colour: bool,
    steps: u32,
    failures: u32,
}

impl Screen {
    pub(crate) fn new() -> Self {
        Self { in_colour: std::io::stdout().is_terminal(), steps: 0, failures: 0 }
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.in_colour { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A heading without number.
    pub(crate) fn title(&self, text: &str) {
        println!("{}", self.paint(BOLD, text));
    }

    /// The next numbered step.
    pub(crate) fn step(&mut self, text: &str) {
        self.steps += 1;
        println!("\n{}", self.paint(BOLD, &format!("{}  {text}", self.steps)));
    }

    /// A command as one would type it.
    pub(crate) fn command(&self, place: &str, text: &str) {
        println!("   {} {text}", self.paint(DIM, &format!("{place:<8} $")));
    }

    /// What a command printed, or a file that it reads.
    pub(crate) fn block(&self, text: &str) {
        for line in text.trim_end().lines() {
            println!("              {line}");
        }
    }

    /// What one end saw.
    pub(crate) fn saw(&self, who: &str, what: &str) {
        println!("   {who:<8}   {what}");
    }

    /// What the observations add up to.
    pub(crate) fn verdict(&mut self, holds: bool, promise: &str) {
        if holds {
            println!("   {}", self.paint(GREEN, &format!("✓ {promise}")));
        } else {
            self.failures += 1;
            println!("   {}", self.paint(RED, &format!("✗ not so: {promise}")));
        }
    }

    /// Verdicts that did not hold.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }
}
