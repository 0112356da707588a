// What Grafana publishes of a dashboard's shape, as it is in a JSON file. Only for test_dashboard.py, which gives each
// part of the dashboard as a literal of its type: a name that the type has not, a value that it does not take or one
// that is missing is then an error.
import type * as dashboard from "@grafana/schema/dist/esm/raw/dashboard/x/Dashboard_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as timeseries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type { Dataquery } from "@grafana/grafana-foundation-sdk/prometheus";

// Enums are their values in JSON.
type Plain<T> = T extends string
  ? `${T}`
  : T extends object
    ? { [Name in keyof T]: Plain<T[Name]> }
    : T;

type Query = Omit<Dataquery, "_implementsDataqueryVariant">;

type PanelOf<Type extends string, Options, Custom> = Omit<dashboard.Panel, "type" | "options" | "targets" | "fieldConfig"> & {
  type: Type;
  options: Options;
  targets: Query[];
  fieldConfig: {
    defaults: Omit<dashboard.FieldConfig, "custom"> & { custom?: Custom };
    overrides: dashboard.FieldConfigSource["overrides"];
  };
};

export type StatPanel = Plain<PanelOf<"stat", stat.Options, never>>;
export type TimeseriesPanel = Plain<PanelOf<"timeseries", timeseries.Options, timeseries.FieldConfig>>;
export type TablePanel = Plain<PanelOf<"table", table.Options, table.FieldConfig>>;
export type RowPanel = Plain<dashboard.RowPanel>;
export type Around = Plain<Omit<dashboard.Dashboard, "panels">>;
