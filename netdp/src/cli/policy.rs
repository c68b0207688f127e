//! `netdp policy`: who may open connections into a network.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use hyper::Method;

use super::{print, print_json, table::Table};
use crate::api::{
    client::{self, Client},
    wire,
};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Replace a network's rules by those of a file
    Set(Set),
    /// Show a network's rules
    Show(Show),
    /// Append rules
    Add(Add),
    /// Remove a rule
    Rm(Remove),
}

#[derive(Args, Debug)]
pub(super) struct Set {
    /// The network
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// Rules, one per line, the first match decides; - reads standard input
    ///
    /// `allow from ADDRESS`, `deny from ADDRESS`, where ADDRESS is an address, a prefix, a range
    /// FIRST-LAST, or `any`; # begins a comment. Who matches no rule may connect: end an allowlist
    /// with `deny from any`.
    file: PathBuf,
}

#[derive(Args, Debug)]
pub(super) struct Show {
    /// The network
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// Print a JSON list
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Add {
    /// The network
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// Like "allow from 192.0.2.0/24" or "deny from any", in quotes
    #[arg(value_name = "RULE", required = true)]
    rules: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct Remove {
    /// The network
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// The rule's number, as `policy show` has it
    #[arg(value_name = "N")]
    number: u32,
}

impl Verb {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let path = |network: &str| client::path(&["networks", network, "policy"]);
        match self {
            Self::Set(Set { network, file }) => {
                let request = wire::Policy { text: read(&file)? };
                let rules = change(client, Method::PUT, &path(&network), &request).await?;
                say_what_holds(&network, &rules)
            }
            Self::Add(Add { network, rules }) => {
                let request = wire::Policy { text: rules.join("\n") };
                let rules = change(client, Method::POST, &path(&network), &request).await?;
                say_what_holds(&network, &rules)
            }
            Self::Rm(Remove { network, number }) => {
                let path = client::path(&["networks", &network, "policy", &number.to_string()]);
                let left: Vec<wire::NumberedRule> = client.order(Method::DELETE, &path).await?;
                say_what_holds(&network, &left)
            }
            Self::Show(Show { network, json }) => {
                let rules: Vec<wire::NumberedRule> = client.get(&path(&network)).await?;
                if json {
                    return print_json(&rules);
                }
                let mut table = Table::new(["N", "RULE"]);
                for wire::NumberedRule { number, rule } in rules {
                    table.row([number.to_string(), rule]);
                }
                print(&table.to_string())
            }
        }
    }
}

async fn change(
    client: &Client,
    method: Method,
    path: &str,
    request: &wire::Policy,
) -> Result<Vec<wire::NumberedRule>> {
    client.send(method, path, request).await
}

/// An empty file is a policy, too, and perhaps not the one that was meant.
fn say_what_holds(network: &str, rules: &[wire::NumberedRule]) -> Result<()> {
    print(&match rules.len() {
        0 => format!("{network}: no rules: everybody may connect to what is published\n"),
        1 => format!("{network}: 1 rule\n"),
        many => format!("{network}: {many} rules\n"),
    })
}

fn read(file: &Path) -> Result<String> {
    let text = if file == Path::new("-") {
        io::read_to_string(io::stdin())
    } else {
        fs::read_to_string(file)
    };
    text.with_context(|| format!("read policy {}", file.display()))
}
